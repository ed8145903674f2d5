use std::collections::HashSet;
use std::sync::Arc;

/// Gives equal texts one allocation.
///
/// Node and zone names repeat once per endpoint: without this, 100,000 endpoints hold
/// 100,000 copies of a few thousand names.
#[derive(Debug, Default)]
pub struct Interner(HashSet<Arc<str>>);

impl Interner {
    /// The shared copy of `text`.
    pub fn intern(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.0.get(text) {
            return known.clone();
        }
        let new: Arc<str> = text.into();
        self.0.insert(new.clone());
        new
    }

    /// Forgets texts that nobody else holds any more. Costs a pass over all of them.
    pub fn shrink(&mut self) {
        self.0.retain(|text| Arc::strong_count(text) > 1);
    }
}
