//! A real API server for another machine: `lockstep-apiserver DIRECTORY HOST` writes `kubeconfig` and what
//! belongs to it into the directory, with `HOST` as the address that this machine's loopback has there. Says
//! "ready" then, and ends with its input.
#![forbid(unsafe_code)]

use std::io::{Read as _, Write as _};
use std::path::Path;

use anyhow::{Context as _, Result};
use lockstep_integration::apiserver::ApiServer;

fn main() -> Result<()> {
    let mut words = std::env::args().skip(1);
    let usage = "usage: lockstep-apiserver DIRECTORY HOST";
    let (directory, host) = (words.next().context(usage)?, words.next().context(usage)?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let server = runtime.block_on(ApiServer::start())?;
    server.write_access(Path::new(&directory), &host)?;
    writeln!(std::io::stdout(), "ready")?;
    std::io::stdout().flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
