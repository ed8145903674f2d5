//! Certificates on disk: read at the start, and again whenever they are renewed.
//!
//! Whoever renews them replaces files, a symbolic link above them (as Kubernetes does with the
//! `..data` of a mounted Secret), or what is in them. So the content is looked at, nothing else.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use lockstep_server::{Acceptor, Tls};
use tokio::sync::watch;
use tracing::{info, warn};

/// How often the files are looked at: three small reads.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Where the certificates are.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) certificate: PathBuf,
    pub(super) key: PathBuf,
    pub(super) client_ca: Option<PathBuf>,
}

/// The files, and what was made of them.
pub(super) struct Certificates {
    files: Files,
    in_force: Tls,
    trouble: Option<Trouble>,
}

/// Why the files are not in force.
struct Trouble {
    why: String,
    said: bool,
}

impl Certificates {
    /// Reads the files for the first time: what is wrong with them now is an error.
    pub(super) fn read(files: Files) -> anyhow::Result<(Self, Acceptor)> {
        let (in_force, acceptor) = files.use_them()?;
        Ok((Self { files, in_force, trouble: None }, acceptor))
    }

    /// An acceptor where there is something new to use.
    fn look(&mut self) -> Option<Acceptor> {
        let why = match self.files.read() {
            Ok(tls) if tls == self.in_force => {
                if self.trouble.take().is_some_and(|trouble| trouble.said) {
                    info!("the certificate files are again what is in force");
                }
                return None;
            }
            Ok(tls) => match self.files.check(&tls) {
                Ok(acceptor) => {
                    info!("renewed certificates are in force for new connections");
                    (self.in_force, self.trouble) = (tls, None);
                    return Some(acceptor);
                }
                Err(error) => error,
            },
            Err(error) => error,
        };
        let why = format!("{why:#}");
        match &mut self.trouble {
            Some(trouble) if trouble.why == why => {
                // A pair is written one file after the other: that is over by the next look.
                if !std::mem::replace(&mut trouble.said, true) {
                    warn!(why, "the certificate files cannot be used, the certificates before stay in force");
                }
            }
            trouble => *trouble = Some(Trouble { why, said: false }),
        }
        None
    }
}

/// Follows the files for as long as somebody uses what is made of them.
pub(super) async fn follow(mut certificates: Certificates, acceptors: watch::Sender<Acceptor>) {
    let mut looks = tokio::time::interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = looks.tick() => {}
            () = acceptors.closed() => return,
        }
        // A disk may be slow, and streams are not to wait for it.
        let look = tokio::task::spawn_blocking(move || (certificates.look(), certificates));
        let (found, same) = match look.await {
            Ok(looked) => looked,
            Err(error) => {
                tracing::error!(%error, "renewed certificates will not be taken up any more: restart to read them");
                return;
            }
        };
        certificates = same;
        if let Some(acceptor) = found {
            acceptors.send_replace(acceptor);
        }
    }
}

impl Files {
    fn read(&self) -> anyhow::Result<Tls> {
        let read =
            |flag, path: &PathBuf| std::fs::read(path).with_context(|| format!("{flag} {}", path.display()));
        Ok(Tls {
            certificate: read("--tls-cert", &self.certificate)?,
            key: read("--tls-key", &self.key)?,
            client_ca: self.client_ca.as_ref().map(|path| read("--client-ca", path)).transpose()?,
        })
    }

    fn check(&self, tls: &Tls) -> anyhow::Result<Acceptor> {
        Acceptor::new(tls).with_context(|| {
            let mut names =
                format!("--tls-cert {}, --tls-key {}", self.certificate.display(), self.key.display());
            if let Some(client_ca) = &self.client_ca {
                names = format!("{names}, --client-ca {}", client_ca.display());
            }
            names
        })
    }

    fn use_them(&self) -> anyhow::Result<(Tls, Acceptor)> {
        let tls = self.read()?;
        let acceptor = self.check(&tls)?;
        Ok((tls, acceptor))
    }
}
