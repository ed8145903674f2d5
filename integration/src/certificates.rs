//! Certificates for tests, and the directories they are in.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use lockstep_client::transport::{Files, Security};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};

/// File of the authorities in a [`Secret`].
const CA: &str = "ca.crt";
/// File of the certificate chain.
const CERTIFICATE: &str = "tls.crt";
/// File of the private key.
const KEY: &str = "tls.key";

/// A certificate authority.
#[derive(Debug)]
pub struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// Certificate and key, PEM.
#[derive(Debug, Clone)]
pub struct Pair {
    /// The certificate.
    pub certificate: String,
    /// Its key.
    pub key: String,
}

/// Authorities, certificate and key in a directory as Kubernetes mounts a Secret: each file is a
/// symbolic link through `..data`, which is replaced as a whole where the Secret changes.
#[derive(Debug)]
pub struct Secret {
    directory: PathBuf,
    generation: u32,
}

impl Authority {
    /// A new one that nobody trusts yet.
    pub fn new() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate()?;
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { pem, issuer: Issuer::new(params, key) })
    }

    /// Its certificate.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// A certificate for these hosts (names or addresses).
    pub fn issue(&self, common: &str, hosts: &[&str]) -> Result<Pair> {
        self.sign(common, hosts, false)
    }

    /// The same, out of date.
    pub fn issue_expired(&self, common: &str, hosts: &[&str]) -> Result<Pair> {
        self.sign(common, hosts, true)
    }

    fn sign(&self, common: &str, hosts: &[&str], expired: bool) -> Result<Pair> {
        let hosts: Vec<String> = hosts.iter().map(|&host| host.to_owned()).collect();
        let mut params = CertificateParams::new(hosts)?;
        params.distinguished_name.push(DnType::CommonName, common);
        if expired {
            params.not_before = date_time_ymd(2020, 1, 1);
            params.not_after = date_time_ymd(2021, 1, 1);
        }
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Pair { certificate, key: key.serialize_pem() })
    }
}

impl Secret {
    /// Makes the directory and fills it. Without a pair there is only an authority.
    pub fn new(directory: impl Into<PathBuf>, ca: &Authority, pair: Option<&Pair>) -> Result<Self> {
        let mut this = Self { directory: directory.into(), generation: 0 };
        fs::create_dir_all(&this.directory).with_context(|| this.directory.display().to_string())?;
        this.replace(ca, pair)?;
        for name in [CA, CERTIFICATE, KEY] {
            symlink(Path::new("..data").join(name), this.directory.join(name))?;
        }
        Ok(this)
    }

    /// Replaces everything at once, as the kubelet does.
    pub fn replace(&mut self, ca: &Authority, pair: Option<&Pair>) -> Result<()> {
        self.generation += 1;
        let name = format!("..{}", self.generation);
        let inside = self.directory.join(&name);
        fs::create_dir(&inside)?;
        fs::write(inside.join(CA), &ca.pem)?;
        if let Some(pair) = pair {
            fs::write(inside.join(CERTIFICATE), &pair.certificate)?;
            fs::write(inside.join(KEY), &pair.key)?;
        }
        let link = self.directory.join("..new");
        symlink(&name, &link)?;
        fs::rename(link, self.directory.join("..data"))?;
        if self.generation > 1 {
            fs::remove_dir_all(self.directory.join(format!("..{}", self.generation - 1)))?;
        }
        Ok(())
    }

    /// The file of authorities.
    pub fn ca(&self) -> PathBuf {
        self.directory.join(CA)
    }

    /// The file of the certificate chain.
    pub fn certificate(&self) -> PathBuf {
        self.directory.join(CERTIFICATE)
    }

    /// The file of the key.
    pub fn key(&self) -> PathBuf {
        self.directory.join(KEY)
    }

    /// What a client with this directory trusts and, with `shown`, shows.
    pub fn client(&self, shown: bool) -> Security {
        let identity = shown.then(|| (self.certificate(), self.key()));
        Security::Tls(Files { ca: self.ca(), identity })
    }

    /// The same, as flags of the agent and of `lockstepctl`.
    pub fn client_flags(&self, shown: bool) -> Vec<String> {
        let mut flags = vec![flag("--ca", &self.ca())];
        if shown {
            flags.extend([flag("--cert", &self.certificate()), flag("--key", &self.key())]);
        }
        flags
    }

    /// Flags of a control plane that shows the pair and, with `mutual`, wants clients to show one
    /// of this authority.
    pub fn server_flags(&self, mutual: bool) -> Vec<String> {
        let mut flags = vec![flag("--tls-cert", &self.certificate()), flag("--tls-key", &self.key())];
        if mutual {
            flags.push(flag("--client-ca", &self.ca()));
        }
        flags
    }
}

fn flag(name: &str, path: &Path) -> String {
    format!("{name}={}", path.display())
}
