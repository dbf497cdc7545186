//! The program `partita`: the root partition's virtualization stack on a command line.
//!
//! [`options`] reads what the user wants, [`machine`] puts the machine together, [`boot`] loads its
//! operating system, [`network`] what its NICs are plugged into, [`run`] lets it run with all of them
//! until it ends, [`demo`] shows all of it with
//! the [`builtin`] guest, [`hosted`] is that guest where there is no KVM, and [`doctor`] looks at the
//! host. An error is one line, with what helps against it ([`advice`]), and ends the program with 1.

mod advice;
mod boot;
mod builtin;
mod console;
mod demo;
mod doctor;
mod hosted;
mod limits;
mod log;
mod machine;
mod network;
mod options;
mod outlet;
mod panics;
mod resize;
mod restart;
mod run;
mod statistics;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use log::say;
use tracing_subscriber::EnvFilter;

/// How long the end waits for its last messages to be written, if somebody reads them at all.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Runs guests on KVM with the device model of a Hyper-V host.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "\
Examples:
  partita demo
  partita run --kernel vmlinuz --initrd initrd.img --disk debian.img --memory 1G --cpus 2"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot Linux and run it until it powers off
    Run(Box<run::Run>),
    /// Boot the guest that partita carries, and show what it does on a disk made for it
    Demo(demo::Demo),
    /// Be the built-in guest of a hosted partition
    #[command(name = hosted::COMMAND, hide = true)]
    HostedGuest {
        /// What it shall do
        work: String,
    },
    /// Tell what this host can do, and what to do about what is missing
    #[command(after_help = "Example:\n  partita doctor")]
    Doctor,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    let level = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(level)
        .with_writer(|| log::Writer)
        .without_time()
        .with_target(false)
        // It would print them by itself, and panic where that fails.
        .log_internal_errors(false)
        .init();
    // As with any message, nobody may be reading; and the terminal is to be usable whatever happens.
    std::panic::set_hook(Box::new(|panic| {
        console::restore_terminal();
        let trace = Backtrace::capture();
        match trace.status() {
            BacktraceStatus::Captured => say!("{panic}\n{trace}"),
            _ => say!("{panic}"),
        }
        log::flush(LAST_WORDS);
    }));
    panics::listen();
    // A guest of a hosted partition has no files, and gives up all that a signal's handler takes.
    if !matches!(cli.command, Command::HostedGuest { .. })
        && let Err(error) = limits::outlive_file_size_limit()
    {
        say!("{error:#}");
        log::flush(LAST_WORDS);
        return ExitCode::FAILURE;
    }
    let ended = match cli.command {
        Command::Run(run) => run.run(),
        Command::Demo(demo) => demo.run(),
        Command::HostedGuest { work } => hosted::run(&work).map(|()| ExitCode::FAILURE),
        Command::Doctor => doctor::run(),
    };
    let status = ended.unwrap_or_else(|error| {
        say!("{}", advice::line(&error));
        ExitCode::FAILURE
    });
    log::flush(LAST_WORDS);
    status
}

/// Prints to standard output, which may be full or closed.
fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .context("cannot write to standard output")
}

/// Says in one line what is wrong with the command line, or prints the help that was asked for.
fn refuse(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = error.print();
            ExitCode::SUCCESS
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            ExitCode::FAILURE
        }
        _ => {
            // The first paragraph says what is wrong; what follows is usage and hints.
            let text = error.render().to_string();
            let what: Vec<&str> =
                text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
            let what = what.join(" ");
            let what = what.strip_prefix("error: ").unwrap_or(&what);
            say!("{what}; 'partita --help' and 'partita run --help' list the options");
            log::flush(LAST_WORDS);
            ExitCode::FAILURE
        }
    }
}
