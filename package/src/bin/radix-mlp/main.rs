//! The `radix-mlp` command: embeds and reranks text with shared prefixes computed once.

mod demo;
mod embed;
mod engine;
mod input;
mod interrupt;
mod output;
mod progress;
mod rerank;
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
}

fn main() -> ExitCode {
    let result = interrupt::install().and_then(|()| match Cli::parse().command {
        Command::Demo(args) => demo::run(&args),
        Command::Stats(args) => stats::run(&args),
        Command::Embed(args) => embed::run(&args),
        Command::Rerank(args) => rerank::run(&args),
    });
    let Err(error) = result else {
        return ExitCode::SUCCESS;
    };
    if output::is_broken_pipe(&error) {
        // Whoever reads has seen enough, as with `| head`.
        return ExitCode::SUCCESS;
    }
    eprintln!("error: {error:#}");
    ExitCode::FAILURE
}
