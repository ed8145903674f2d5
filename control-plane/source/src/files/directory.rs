//! What the files of the directory say, file by file.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use lockstep_model::{Interner, InvalidField};

use super::manifest::{self, Id, Kind};
use crate::convert::Conversion;
use crate::intake::{Batch, Object, Reading, Tracker};
use crate::{Changes, ObjectName};

/// A file is read when it has not been touched for so long, and gone when it has been
/// missing for so long: editors write in several steps, and some move the old file away.
pub(super) const QUIET: Duration = Duration::from_millis(50);
/// A burst that does not end is cut here.
const LONGEST_BURST: Duration = Duration::from_secs(1);
const SUFFIXES: [&str; 3] = [".yaml", ".yml", ".json"];

/// The directory as it was last read.
pub(super) struct Directory {
    path: PathBuf,
    files: BTreeMap<String, File>,
    /// Which files define an object.
    owners: HashMap<Id, BTreeSet<String>>,
    trackers: [Tracker; Kind::ALL.len()],
    names: Interner,
    batch: Batch,
    burst_since: Option<Instant>,
    /// Everything was read once: what is new from here on is a change.
    started: bool,
    nested_told: BTreeSet<String>,
}

/// One file.
#[derive(Default)]
struct File {
    /// What was last read, whether or not it was any good.
    stamp: Option<Stamp>,
    missing_since: Option<Instant>,
    /// The last good content; `None` = there never was any.
    content: Option<BTreeMap<Id, Definition>>,
    fault: Option<InvalidField>,
}

/// The first definition of an object in a file.
struct Definition {
    conversion: Conversion<Object>,
    /// The file defines it more than once.
    repeated: bool,
}

/// Tells two states of a file apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    length: u64,
    /// When content, name or rights changed: unlike the modification time nobody sets it.
    changed: (i64, i64),
}

/// What one look at the directory brought.
pub(super) struct Look {
    pub(super) changes: Option<Changes>,
    /// Why the state is not complete; `None` = it is.
    pub(super) incomplete: Option<String>,
    /// Something is being written just now: look again soon.
    pub(super) unsettled: bool,
    /// The directory could be read.
    pub(super) readable: bool,
}

impl Directory {
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            files: BTreeMap::new(),
            owners: HashMap::new(),
            trackers: Kind::ALL.map(|kind| Tracker::new(kind.name())),
            names: Interner::default(),
            batch: Batch::default(),
            burst_since: None,
            started: false,
            nested_told: BTreeSet::new(),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Reads what has changed. A directory that cannot be read loses nothing: what was read
    /// of it stays, as it would with an API server that is away.
    pub(super) fn look(&mut self) -> Look {
        let stamps = match self.stamps() {
            Ok(stamps) => stamps,
            Err(error) => {
                let reason = format!("source directory {}: {error}", self.path.display());
                return Look { changes: None, incomplete: Some(reason), unsettled: false, readable: false };
            }
        };
        let unsettled = self.unsettled(&stamps);
        let mut touched = BTreeSet::new();
        let burst = *self.burst_since.get_or_insert_with(Instant::now);
        if !unsettled || burst.elapsed() >= LONGEST_BURST {
            self.burst_since = None;
            self.read_changed(&stamps, &mut touched);
            self.drop_missing(&mut touched);
        }
        let trigger = if self.started { self.trigger(&touched, &stamps) } else { None };
        self.started |= !unsettled;
        for id in touched {
            self.resolve(&id, trigger);
        }
        let incomplete = if unsettled { Some("files are being written".to_owned()) } else { self.blocked() };
        Look { changes: self.batch.finish(), incomplete, unsettled, readable: true }
    }

    /// Name and stamp of every file that is a manifest by its name.
    fn stamps(&mut self) -> io::Result<BTreeMap<String, Stamp>> {
        let mut stamps = BTreeMap::new();
        for entry in fs::read_dir(&self.path)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.starts_with('.') {
                continue;
            }
            // Follows links, and may find that the file is gone by now.
            let Ok(metadata) = fs::metadata(self.path.join(&name)) else { continue };
            if metadata.is_dir() {
                if self.nested_told.insert(name.clone()) {
                    tracing::info!(directory = name, "a directory in the source directory is not read");
                }
            } else if metadata.is_file() && SUFFIXES.iter().any(|suffix| name.ends_with(suffix)) {
                stamps.insert(name, Stamp::of(&metadata));
            }
        }
        Ok(stamps)
    }

    /// Notes who is missing, and tells whether anything changed only just now.
    fn unsettled(&mut self, stamps: &BTreeMap<String, Stamp>) -> bool {
        let mut unsettled = false;
        for (name, file) in &mut self.files {
            match stamps.contains_key(name) {
                true => file.missing_since = None,
                false => unsettled |= file.missing_since.get_or_insert_with(Instant::now).elapsed() < QUIET,
            }
        }
        for (name, stamp) in stamps {
            let known = self.files.get(name).and_then(|file| file.stamp);
            unsettled |= known != Some(*stamp) && !stamp.is_quiet();
        }
        unsettled
    }

    fn read_changed(&mut self, stamps: &BTreeMap<String, Stamp>, touched: &mut BTreeSet<Id>) {
        for (name, stamp) in stamps {
            let known = self.files.get(name).and_then(|file| file.stamp);
            if known == Some(*stamp) || !stamp.is_quiet() {
                continue;
            }
            let path = self.path.join(name);
            let text = fs::read(&path);
            // Written to while it was read: its time will come.
            if fs::metadata(&path).ok().map(|metadata| Stamp::of(&metadata)) != Some(*stamp) {
                continue;
            }
            let parsed = match text.map(String::from_utf8) {
                Ok(Ok(text)) => manifest::parse(&text, name.ends_with(".json"), &mut self.names),
                Ok(Err(_)) => Err("is not UTF-8".to_owned()),
                Err(error) => Err(format!("cannot be read: {error}")),
            };
            self.files.entry(name.clone()).or_default().stamp = Some(*stamp);
            match parsed {
                Ok(manifest) => self.load(name, manifest, touched),
                Err(reason) => self.keep(name, reason),
            }
        }
    }

    /// Takes in the good content of a file.
    fn load(&mut self, name: &str, manifest: manifest::Manifest, touched: &mut BTreeSet<Id>) {
        if !manifest.ignored.is_empty() {
            let ignored: Vec<_> =
                manifest.ignored.iter().map(|(kind, count)| format!("{count} of {kind}")).collect();
            tracing::info!(file = name, "objects of other kinds are not read: {}", ignored.join(", "));
        }
        let mut content: BTreeMap<Id, Definition> = BTreeMap::new();
        for (id, conversion) in manifest.objects {
            let first = content.entry(id);
            first
                .and_modify(|definition| definition.repeated = true)
                .or_insert(Definition { conversion, repeated: false });
        }
        for id in content.keys() {
            self.owners.entry(id.clone()).or_default().insert(name.to_owned());
            touched.insert(id.clone());
        }
        let file = self.files.entry(name.to_owned()).or_default();
        let old = file.content.replace(content);
        if file.fault.take().is_some() {
            self.batch.release(file_name(name));
        }
        self.disown(name, old, touched);
    }

    /// A broken file: its last good content stays.
    fn keep(&mut self, name: &str, reason: String) {
        let fault = InvalidField { field: String::new(), value: name.to_owned(), reason };
        let file = self.files.entry(name.to_owned()).or_default();
        if file.fault.as_ref() != Some(&fault) {
            let told = file.fault.is_some();
            self.batch.quarantine(file_name(name), fault.clone(), file.content.is_some(), told);
            file.fault = Some(fault);
        }
    }

    fn drop_missing(&mut self, touched: &mut BTreeSet<Id>) {
        let quiet = |file: &File| file.missing_since.is_some_and(|since| since.elapsed() >= QUIET);
        let gone: Vec<_> =
            self.files.iter().filter(|(_, file)| quiet(file)).map(|(name, _)| name.clone()).collect();
        for name in gone {
            let Some(file) = self.files.remove(&name) else { continue };
            if file.fault.is_some() {
                self.batch.release(file_name(&name));
            }
            self.disown(&name, file.content, touched);
        }
    }

    /// Takes away what `name` defined and does not define any more.
    fn disown(&mut self, name: &str, old: Option<BTreeMap<Id, Definition>>, touched: &mut BTreeSet<Id>) {
        let now = self.files.get(name).and_then(|file| file.content.as_ref());
        for (id, _) in old.into_iter().flatten() {
            if now.is_some_and(|now| now.contains_key(&id)) {
                continue;
            }
            if let Some(owners) = self.owners.get_mut(&id) {
                owners.remove(name);
                if owners.is_empty() {
                    self.owners.remove(&id);
                }
            }
            touched.insert(id);
        }
    }

    /// When the newest of the files changed that define what changed.
    fn trigger(&self, touched: &BTreeSet<Id>, stamps: &BTreeMap<String, Stamp>) -> Option<SystemTime> {
        let owners = touched.iter().filter_map(|id| self.owners.get(id)).flatten();
        owners.filter_map(|name| stamps.get(name)).map(Stamp::changed_at).max()
    }

    /// Puts the one definition in force that counts: that of the first file by name.
    fn resolve(&mut self, id: &Id, trigger: Option<SystemTime>) {
        let (kind, name) = id;
        let tracker = &mut self.trackers[*kind as usize];
        let mut owners = self.owners.get(id).into_iter().flatten();
        let first =
            owners.next().and_then(|first| Some((first, self.files.get(first)?.content.as_ref()?.get(id)?)));
        let Some((first, definition)) = first else { return tracker.remove(name, &mut self.batch) };
        let again = if definition.repeated { Some(first) } else { owners.next() };
        let note = again.map(|again| InvalidField {
            field: String::new(),
            value: again.clone(),
            reason: format!("defines the object again: its first definition, in {first}, is in force"),
        });
        let conversion = definition.conversion.clone().map_err(|mut fault| {
            fault.reason.push_str(&format!(" (in {first})"));
            fault
        });
        let reading = Reading { name, uid: None, conversion, note, trigger };
        tracker.take(reading, &mut self.batch);
    }

    /// Which broken file has nothing good to fall back on.
    fn blocked(&self) -> Option<String> {
        let mut broken = self.files.values().filter(|file| file.content.is_none());
        let fault = broken.find_map(|file| file.fault.as_ref())?;
        Some(format!("{}: {} {}", self.path.display(), fault.value, fault.reason))
    }
}

impl Stamp {
    fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            length: metadata.len(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    fn changed_at(&self) -> SystemTime {
        let seconds = u64::try_from(self.changed.0).unwrap_or_default();
        let nanoseconds = u32::try_from(self.changed.1).unwrap_or_default();
        SystemTime::UNIX_EPOCH + Duration::new(seconds, nanoseconds)
    }

    /// A change in the future is one of another clock, and no reason to wait.
    fn is_quiet(&self) -> bool {
        SystemTime::now().duration_since(self.changed_at()).map_or(true, |age| age >= QUIET)
    }
}

fn file_name(name: &str) -> ObjectName {
    ObjectName { kind: "File".to_owned(), name: name.to_owned() }
}
