//! The `darnet` command. See [`cli`] for the subcommands; everything they do is in the library.

mod cli;

fn main() -> std::process::ExitCode {
    cli::run()
}
