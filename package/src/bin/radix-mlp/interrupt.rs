//! Ctrl-C and SIGTERM end a run at once and leave no temporary file.

use std::path::{Path, PathBuf};
use std::process::exit;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The file that is being written, if any.
static UNFINISHED: Mutex<Option<PathBuf>> = Mutex::new(None);

fn unfinished() -> MutexGuard<'static, Option<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn install() -> anyhow::Result<()> {
    let end = || {
        // Held to the end: a file that is about to get its name does not get it any more.
        let unfinished = unfinished();
        if let Some(path) = &*unfinished {
            // What cannot be removed cannot be helped now.
            let _ = std::fs::remove_file(path);
        }
        eprintln!("error: interrupted");
        exit(130)
    };
    Ok(ctrlc::set_handler(end)?)
}

/// Removes `path` if the run is interrupted before [`finish`].
pub fn remove_if_interrupted(path: &Path) {
    *unfinished() = Some(path.to_owned());
}

/// Gives the unfinished file its name by `persist`, which an interrupt comes before or after.
pub fn finish<T>(persist: impl FnOnce() -> T) -> T {
    let mut unfinished = unfinished();
    *unfinished = None;
    persist()
}
