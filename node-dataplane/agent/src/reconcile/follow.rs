//! What follows a pass, and what is heard of it.

use lockstep_client::session::Now;
use lockstep_model::ServiceKey;

use super::Reconciler;

impl Reconciler {
    /// The plan is in force for these Services (`None` = all), but for those that fail. True where
    /// the next Ack has something new to say by it.
    pub(super) fn follow_up(&mut self, changed: Option<&[ServiceKey]>, now: Now) -> bool {
        let Self { follow_ups, view, failures, .. } = self;
        for follow_up in follow_ups {
            follow_up.committed(view.plan(), changed, &|key| failures.has(key));
        }
        self.heed_complaints(now)
    }

    /// Takes news of what follows passes in. True where there are any.
    pub(super) fn heed_complaints(&mut self, now: Now) -> bool {
        let mut news = false;
        for (of, follow_up) in self.follow_ups.iter_mut().enumerate() {
            if let Some(complaints) = follow_up.complaints() {
                news |= self.failures.complained(of, complaints, now);
            }
        }
        news
    }
}
