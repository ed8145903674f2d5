use std::collections::BTreeMap;
use std::time::SystemTime;

use lockstep_model::InvalidField;

/// Source objects that could not be taken in, by kind and name.
#[derive(Debug, Default)]
pub struct Quarantine(BTreeMap<(String, String), Quarantined>);

/// Why one object is in quarantine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quarantined {
    /// The fault; an empty field path means the object as a whole.
    pub fault: InvalidField,
    /// True = its last good content is still served; false = nothing of it is.
    pub previous_in_force: bool,
    /// Since when it is in quarantine, whatever its fault was at first.
    pub since: SystemTime,
}

impl Quarantine {
    /// Puts an object in, or changes why it is in. True where it was not in before.
    pub fn add(
        &mut self,
        kind: String,
        name: String,
        fault: InvalidField,
        previous_in_force: bool,
        now: SystemTime,
    ) -> bool {
        let mut new = false;
        let entry = self.0.entry((kind, name)).or_insert_with(|| {
            new = true;
            Quarantined { fault: fault.clone(), previous_in_force, since: now }
        });
        entry.fault = fault;
        entry.previous_in_force = previous_in_force;
        new
    }

    /// Takes an object out. False where it was not in.
    pub fn remove(&mut self, kind: &str, name: &str) -> bool {
        self.0.remove(&(kind.to_owned(), name.to_owned())).is_some()
    }

    /// Number of objects.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True where every object is good.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// (kind, name, why), sorted by kind and name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str, &Quarantined)> {
        self.0.iter().map(|((kind, name), it)| (kind.as_str(), name.as_str(), it))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn fault(reason: &str) -> InvalidField {
        InvalidField { field: "spec".into(), value: "x".into(), reason: reason.into() }
    }

    #[test]
    fn a_new_fault_of_the_same_object_keeps_since() {
        let start = SystemTime::UNIX_EPOCH;
        let mut quarantine = Quarantine::default();
        assert!(quarantine.add("Service".into(), "a/b".into(), fault("one"), false, start));
        assert!(!quarantine.add(
            "Service".into(),
            "a/b".into(),
            fault("two"),
            true,
            start + Duration::from_secs(9)
        ));
        let all: Vec<_> = quarantine.iter().collect();
        let expected = Quarantined { fault: fault("two"), previous_in_force: true, since: start };
        assert_eq!(all, vec![("Service", "a/b", &expected)]);
        assert!(quarantine.remove("Service", "a/b"));
        assert!(!quarantine.remove("Service", "a/b"));
    }
}
