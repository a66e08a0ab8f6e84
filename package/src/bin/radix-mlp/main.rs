//! The `radix-mlp` command: embeds and reranks text with shared prefixes computed once.

mod demo;
mod embed;
mod engine;
mod input;
mod interrupt;
mod output;
mod progress;
mod rerank;
#[cfg(feature = "server")]
mod serve;
mod stats;
mod window;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Embeds and reranks text with Qwen3 models; prefixes that texts share are computed once.
#[derive(Parser)]
#[command(name = "radix-mlp", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::Args),
    Stats(stats::Args),
    Embed(embed::Args),
    Rerank(rerank::Args),
    #[cfg(feature = "server")]
    Serve(serve::Args),
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        // It ends once all is answered.
        #[cfg(feature = "server")]
        Command::Serve(args) => serve::run(&args),
        Command::Demo(args) => interrupt::install().and_then(|()| demo::run(&args)),
        Command::Stats(args) => interrupt::install().and_then(|()| stats::run(&args)),
        Command::Embed(args) => interrupt::install().and_then(|()| embed::run(&args)),
        Command::Rerank(args) => interrupt::install().and_then(|()| rerank::run(&args)),
    }
}

fn main() -> ExitCode {
    let Err(error) = run(Cli::parse().command) else {
        return ExitCode::SUCCESS;
    };
    if output::is_broken_pipe(&error) {
        // Whoever reads has seen enough, as with `| head`.
        return ExitCode::SUCCESS;
    }
    eprintln!("error: {error:#}");
    ExitCode::FAILURE
}
