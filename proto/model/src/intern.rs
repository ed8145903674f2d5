use std::sync::Arc;

use hashbrown::HashSet;

/// Gives equal texts one allocation.
///
/// Node and zone names repeat once per endpoint: without this, 100,000 endpoints hold
/// 100,000 copies of a few thousand names. Names that nobody uses any more are dropped from
/// time to time, so a cluster whose pods come and go does not grow it.
#[derive(Debug)]
pub struct Interner {
    texts: HashSet<Arc<str>>,
    /// Number of texts at which the unused ones are dropped.
    limit: usize,
}

const MIN_LIMIT: usize = 4_096;

impl Default for Interner {
    fn default() -> Self {
        Self { texts: HashSet::new(), limit: MIN_LIMIT }
    }
}

impl Interner {
    /// The shared copy of `text`.
    pub fn intern(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return known.clone();
        }
        if self.texts.len() >= self.limit {
            self.shrink();
        }
        let new: Arc<str> = text.into();
        self.texts.insert(new.clone());
        new
    }

    /// Drops texts that nobody else holds any more. Costs a pass over all of them, and happens
    /// by itself whenever their number has doubled.
    pub fn shrink(&mut self) {
        self.texts.retain(|text| Arc::strong_count(text) > 1);
        self.limit = MIN_LIMIT.max(2 * self.texts.len());
        self.texts.shrink_to(self.limit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_share_one_allocation() {
        let mut interner = Interner::default();
        let (a, b) = (interner.intern("node-a"), interner.intern("node-a"));
        assert!(Arc::ptr_eq(&a, &b));
        assert_eq!(&*interner.intern("node-b"), "node-b");
    }

    #[test]
    fn passing_names_do_not_pile_up() {
        let mut interner = Interner::default();
        let kept: Vec<_> = (0..10_000).map(|index| interner.intern(&format!("kept-{index}"))).collect();
        for index in 0..200_000 {
            interner.intern(&format!("passing-{index}"));
        }
        assert!(interner.texts.len() <= 2 * kept.len(), "{} texts", interner.texts.len());
        assert!(kept.iter().all(|name| Arc::ptr_eq(name, &interner.intern(name))));
    }
}
