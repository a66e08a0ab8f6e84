//! Memory that requests in progress may take, counted in what takes it.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::ApiError;

/// Room for so many of something, for all requests together.
pub struct Capacity {
    free: Arc<Semaphore>,
    most: usize,
    what: &'static str,
}

impl Capacity {
    pub fn new(most: usize, what: &'static str) -> Self {
        let free = Arc::new(Semaphore::new(most));
        Self { free, most, what }
    }

    /// Room for `count`.
    pub fn take(&self, count: usize) -> Result<OwnedSemaphorePermit, ApiError> {
        let mut held = self.acquire(0)?;
        self.extend(&mut held, count)?;
        Ok(held)
    }

    /// Room for `count` more than what is held. Refused with 413 where one request never gets as
    /// much, with 429 where others have it.
    pub fn extend(&self, held: &mut OwnedSemaphorePermit, count: usize) -> Result<(), ApiError> {
        let (total, most, what) = (
            held.num_permits().saturating_add(count),
            self.most,
            self.what,
        );
        if total > most {
            let message =
                format!("{total} {what} are more than the {most} of all requests together");
            return Err(ApiError::too_large(message));
        }
        held.merge(self.acquire(count)?);
        Ok(())
    }

    fn acquire(&self, count: usize) -> Result<OwnedSemaphorePermit, ApiError> {
        let permit = self.free.clone().try_acquire_many_owned(count as u32);
        permit.map_err(|_| {
            let what = self.what;
            ApiError::overloaded(format!(
                "there is no room for {count} more {what}: try again"
            ))
        })
    }
}
