//! With the feature `cuda`, compiles `cuda/*.cu` to one fat binary each: machine code for the GPUs below that nvcc knows,
//! and PTX that drivers translate for all later ones.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

const KERNELS: [&str; 3] = ["index_select", "layer", "tree_attention"];
/// Ampere, Ada and Hopper.
const MACHINES: [&str; 3] = ["80", "89", "90"];
const PTX: &str = "80";
/// For Hopper's own instructions, which no other GPU has: machine code alone.
const HOPPER_KERNEL: &str = "tree_attention_hopper";
const HOPPER_MACHINE: &str = "90a";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    println!("cargo::rerun-if-changed=cuda");
    for variable in ["CUDA_HOME", "PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let nvcc = nvcc()?;
    let known = stdout(Command::new(&nvcc).arg("--list-gpu-code"))?;
    let is_known = |machine: &&str| {
        let code = format!("sm_{machine}");
        known.lines().any(|line| line.trim() == code)
    };
    let code = |machine| format!("-gencode=arch=compute_{machine},code=sm_{machine}");
    let mut targets = vec![format!("-gencode=arch=compute_{PTX},code=compute_{PTX}")];
    targets.extend(MACHINES.into_iter().filter(is_known).map(code));
    for kernel in KERNELS {
        compile(&nvcc, kernel, &targets)?;
    }
    compile(&nvcc, HOPPER_KERNEL, &[code(HOPPER_MACHINE)])
}

/// `cuda/{kernel}.cu` to a fat binary in cargo's output folder.
fn compile(nvcc: &Path, kernel: &str, targets: &[String]) -> Result<(), Box<dyn Error>> {
    let source = Path::new("cuda").join(kernel).with_extension("cu");
    let out = PathBuf::from(env::var("OUT_DIR")?).join(kernel);
    let mut command = Command::new(nvcc);
    command.args(["-std=c++17", "-O3", "-Icuda", "-fatbin", "-o"]);
    command.arg(out.with_extension("fatbin")).arg(source);
    stdout(command.args(targets))?;
    Ok(())
}

/// `CUDA_HOME`'s, the PATH's, or that of the wheel `nvidia-cuda-nvcc` in the workspace's virtual environment.
fn nvcc() -> Result<PathBuf, Box<dyn Error>> {
    let home = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let wheels = Path::new(&env::var("CARGO_MANIFEST_DIR")?).join("../.venv/lib");
    let wheels = wheels.read_dir().into_iter().flatten().flatten();
    let wheels = wheels.map(|python| python.path().join("site-packages/nvidia/cu13/bin"));
    let mut folders = home
        .into_iter()
        .chain(env::split_paths(&path))
        .chain(wheels);
    let found = folders.find_map(|folder| Some(folder.join("nvcc")).filter(|nvcc| nvcc.is_file()));
    found.ok_or_else(|| {
        "the feature `cuda` needs nvcc, which is neither in CUDA_HOME nor on the PATH nor among the wheels of .venv: \
         install the CUDA toolkit, or set CUDA_HOME to what `python3 kernels/toolkit.py target/cuda` prints"
            .into()
    })
}

/// What `command` prints. An error with its output where it fails.
fn stdout(command: &mut Command) -> Result<String, Box<dyn Error>> {
    let output = command
        .output()
        .map_err(|error| format!("{command:?}: {error}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{command:?}: {}\n{text}", output.status).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}
