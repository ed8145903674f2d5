//! Certificates on disk, as they are when a connection is made.
//!
//! They are renewed every few days while a stream may last for months. What is read is compared
//! by content: the file, or a symbolic link on the way to it, may be another one each time.

use std::fmt;
use std::path::{Path, PathBuf};

use tonic::transport::{Certificate, ClientTlsConfig, Identity};

use super::chain;

/// Where certificates are, all PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// Certificate authorities of the server.
    pub ca: PathBuf,
    /// Certificate chain and key of this client, if the server asks.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file cannot be read.
    #[error("{}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Without an authority, every server would be refused, for ever.
    #[error("{}: there is no PEM certificate in it", path.display())]
    NoCertificate {
        /// The file.
        path: PathBuf,
    },
    /// Certificates and key are damaged or do not fit together.
    #[error("the certificates cannot be used")]
    Unusable(#[source] tonic::transport::Error),
}

/// The files, and what was read from them and is in use.
#[derive(Clone)]
pub(super) struct Credentials {
    files: Files,
    in_use: Content,
    /// What was said to be wrong with the files: a line is written when that changes.
    trouble: Option<String>,
}

#[derive(Clone, PartialEq, Eq)]
struct Content {
    ca: Vec<u8>,
    identity: Option<(Vec<u8>, Vec<u8>)>,
}

impl Credentials {
    pub(super) fn read(files: Files) -> Result<(Self, ClientTlsConfig), CredentialsError> {
        let in_use = files.read()?;
        let tls = in_use.config();
        Ok((Self { files, in_use, trouble: None }, tls))
    }

    /// Looks at the files, and has what is new in them put to use. While they cannot be used, all
    /// stays as it is.
    pub(super) fn renew(
        &mut self,
        put_to_use: impl FnOnce(&ClientTlsConfig) -> Result<(), CredentialsError>,
    ) {
        let result = match self.files.read() {
            Ok(content) if content == self.in_use => {
                if self.trouble.take().is_some() {
                    tracing::info!("the certificate files are again what is in use");
                }
                return;
            }
            Ok(content) => put_to_use(&content.config()).map(|()| content),
            Err(error) => Err(error),
        };
        match result {
            Ok(content) => {
                tracing::info!("renewed certificates are in use");
                (self.in_use, self.trouble) = (content, None);
            }
            Err(error) => {
                let why = chain(&error);
                if self.trouble.as_ref() != Some(&why) {
                    let Files { ca, identity } = &self.files;
                    tracing::warn!(
                        why,
                        ?ca,
                        ?identity,
                        "the certificate files cannot be used, the certificates before stay in use"
                    );
                    self.trouble = Some(why);
                }
            }
        }
    }
}

impl Files {
    fn read(&self) -> Result<Content, CredentialsError> {
        let ca = read(&self.ca)?;
        if !String::from_utf8_lossy(&ca).contains("-----BEGIN CERTIFICATE-----") {
            return Err(CredentialsError::NoCertificate { path: self.ca.clone() });
        }
        let identity = match &self.identity {
            Some((certificate, key)) => Some((read(certificate)?, read(key)?)),
            None => None,
        };
        Ok(Content { ca, identity })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, CredentialsError> {
    std::fs::read(path).map_err(|source| CredentialsError::File { path: path.to_owned(), source })
}

impl Content {
    fn config(&self) -> ClientTlsConfig {
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&self.ca));
        match &self.identity {
            Some((certificate, key)) => tls.identity(Identity::from_pem(certificate, key)),
            None => tls,
        }
    }
}

impl fmt::Debug for Credentials {
    /// Without keys.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.files.fmt(f)
    }
}
