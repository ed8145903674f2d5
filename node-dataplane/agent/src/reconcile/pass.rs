//! One programming pass, and looking after what is in force.

use std::error::Error;
use std::time::{Duration, Instant};

use lockstep_client::Position;
use lockstep_client::report::Stats;
use lockstep_client::session::{Committed, Now};
use lockstep_model::ServiceKey;
use lockstep_view::Changed;
use lockstep_view::backend::{Applied, BackendError, Drift};

use super::{GIVE_BACK_AFTER, GIVE_BACK_FROM, KEEP_OTHERS, Pending, Reconciler, pace};
use crate::metrics::{Changes, Phase};

/// A read-back that differs this many times in a row, each time after comparing everything, is
/// reported as a fault of the backend.
const STUBBORN: u32 = 3;
/// With more Services than this to program, the control plane first learns that they arrived.
const WORTH_AN_ACK: usize = 1_000;
/// A verified change waits so long at most for the cache's `write`, which has as long as reading back
/// takes before; after that the next turns ask for it.
const SETTLE: Duration = Duration::from_millis(20);
/// One line about repairs in this time at most, however often somebody interferes.
const REPAIR_LOG: Duration = Duration::from_secs(10);

impl Reconciler {
    /// Programs what waits, if anything does and if it is time; then what was written before is
    /// read back, if that was put off until now.
    pub(super) fn work(&mut self, now: Now) {
        self.program(now);
        if let Some(position) = self.report.applied
            && self.unread
            && self.pace.read_back_due(now.monotonic)
        {
            self.verify(position);
        }
    }

    fn program(&mut self, now: Now) {
        let Some(position) = self.session.position() else { return };
        let recheck = self.recheck_at.is_some_and(|at| now.monotonic >= at);
        if self.held_back || (!self.pending.any && !recheck) {
            return;
        }
        if !self.pace.may_program(now.monotonic) {
            return self.wait_for_backend(now);
        }
        if !recheck && self.rests(now) {
            return;
        }
        let mut pending = std::mem::take(&mut self.pending);
        let since = *pending.since.get_or_insert(now);
        let started = Instant::now();
        self.status.update(|status| {
            status.pending_since.get_or_insert(since.monotonic);
        });
        if pending.services.len() > WORTH_AN_ACK {
            self.acknowledge();
        }
        let changed = self.decide(&mut pending, now);
        let full = pending.full || recheck || !self.programmed;
        let viewed = Instant::now();
        let result = if full {
            self.backend.sync(self.view.plan()).map(Some)
        } else if changed.is_empty() {
            Ok(None)
        } else {
            self.backend.apply(self.view.plan(), &changed.services).map(Some)
        };
        let changed = changed.services;
        let done = Instant::now();
        let stats = Stats {
            queue: started.saturating_duration_since(since.monotonic),
            program: done - started,
            verify: None,
            coalesced: pending.transactions.max(1),
            kernel_objects_changed: 0,
            full_sync: full,
        };
        self.metrics.phase(Phase::Queue, stats.queue);
        self.metrics.phase(Phase::View, viewed - started);
        self.metrics.phase(Phase::Apply, done - viewed);
        self.keep(pending.committed);
        match result {
            Err(error) => {
                self.pending.transactions = pending.transactions;
                self.pending.changes = pending.changes;
                self.refused(&error, Some(since), pending.trigger);
            }
            Ok(applied) => {
                if !full {
                    self.pace.changed(done - started, done);
                }
                self.metrics.changes(Changes::default(), Changes::default());
                self.programmed(position, applied, stats, (!full).then_some(&changed[..]));
                let took = done.saturating_duration_since(started);
                let wall = now.wall + done.saturating_duration_since(now.monotonic);
                self.metrics.programmed(took, full, pending.trigger, wall);
                self.status.update(|status| status.programmed = Some(wall));
            }
        }
        self.touched += if full { GIVE_BACK_FROM } else { changed.len() };
        if self.touched >= GIVE_BACK_FROM {
            self.touched = 0;
            self.give_back_at.get_or_insert(now.monotonic + GIVE_BACK_AFTER);
        }
    }

    /// True where nothing but changes of resources waits, and these wait for more of them: passes
    /// had their share of the time. What compares everything has times of its own.
    pub(super) fn rests(&self, now: Now) -> bool {
        let Pending { full, node, .. } = self.pending;
        let since = self.pending.since.map(|since| since.monotonic);
        self.programmed && !full && !node && !self.pace.changes_due(since, now.monotonic)
    }

    /// The backend refused and is given time. The plan and the disk go on, so that what waits
    /// does not grow: everything will be compared anyway.
    fn wait_for_backend(&mut self, now: Now) {
        let mut pending = std::mem::take(&mut self.pending);
        if !pending.services.is_empty() {
            self.decide(&mut pending, now);
            pending.services.clear();
        }
        self.keep(std::mem::take(&mut pending.committed));
        self.pending = Pending { any: true, full: true, ..pending };
    }

    /// Brings the plan up to date. Returns what the backend must look at.
    fn decide(&mut self, pending: &mut Pending, now: Now) -> Changed {
        let state = self.session.state();
        if !std::mem::replace(&mut self.viewed, true) {
            pending.services = state.service_keys().cloned().collect();
        }
        let mut changed = self.view.update(state, &pending.services);
        pending.full |= changed.node;
        self.failures.planned(self.view.plan(), &changed.services, now);
        if !pending.retries.is_empty() {
            changed.services.append(&mut pending.retries);
            changed.services.sort_unstable();
            changed.services.dedup();
        }
        changed
    }

    /// The backend did its part.
    fn programmed(
        &mut self,
        position: Position,
        applied: Option<Applied>,
        mut stats: Stats,
        changed: Option<&[ServiceKey]>,
    ) {
        let untouched = applied.is_none();
        let now = Now::read();
        if let Some(applied) = applied {
            stats.kernel_objects_changed = u32::try_from(applied.objects_changed).unwrap_or(u32::MAX);
            self.metrics.objects_changed.inc_by(applied.objects_changed as u64);
            let tried = |key: &_| changed.is_none_or(|changed| changed.binary_search(key).is_ok());
            self.failures.passed(applied.failures, tried, now);
            // Said by the Ack below.
            self.follow_up(changed, now);
        }
        self.accepted();
        if stats.full_sync {
            self.recheck_at = None;
            tracing::info!(
                position = %position, objects_changed = stats.kernel_objects_changed,
                took_ms = stats.program.as_millis(), "compared everything with the kernel"
            );
        }
        if !self.programmed {
            self.programmed = true;
            // Rules that were right already are those of an earlier process.
            self.session.identity_mut().kernel_adopted = stats.kernel_objects_changed == 0;
        }
        let verified = self.report.verified.is_some() && self.report.verified == self.report.applied;
        self.report.applied = Some(position);
        self.report.stats = Some(stats);
        self.status.update(|status| status.pending_since = None);
        if untouched && verified {
            // Nothing was written: what was read back before is what is there.
            if self.is_settled(Duration::ZERO) {
                self.report.verified = Some(position);
            } else {
                self.unsettled = Some(position);
            }
        }
        self.mirror();
        self.acknowledge();
        if untouched && verified {
            return;
        }
        // What is read later covers this too. A version that counts as verified already, because
        // only a retry wrote, is not to count so before it is read.
        let later = !stats.full_sync
            && self.report.verified != Some(position)
            && !self.pace.read_back_due(now.monotonic);
        if later && self.backend.read_back_later() {
            (self.unread, self.unsettled) = (true, None);
        } else {
            self.verify(position);
        }
    }

    /// Reads back what was written.
    fn verify(&mut self, position: Position) {
        (self.unread, self.unsettled) = (false, None);
        let started = Instant::now();
        let result = self.backend.verify();
        let took = started.elapsed();
        self.metrics.phase(Phase::Verify, took);
        if let Some(stats) = &mut self.report.stats {
            stats.verify = Some(took);
            if !stats.full_sync {
                self.pace.read_back(took, started + took);
            }
        }
        match result {
            // Only what was written last was read: an older difference is still open.
            Ok(drift) if drift.is_empty() && self.recheck_at.is_some() => {}
            Ok(drift) if drift.is_empty() => match self.remove_others() {
                Ok(()) => {
                    self.differing = 0;
                    self.recovered();
                    self.settle(position, SETTLE);
                }
                Err(text) => self.unverified(&text),
            },
            Ok(drift) => {
                let text = describe(&drift);
                tracing::warn!(
                    drift = text,
                    "what was read back differs from what was written, comparing everything"
                );
                self.unverified(&format!("the kernel does not keep what is written: {text}"));
            }
            Err(error) => self.refused(&error, None, None),
        }
    }

    /// What was read back is verified once the cache has it too, or says that it has not.
    pub(super) fn settle(&mut self, position: Position, patience: Duration) {
        self.unsettled = None;
        if self.report.applied != Some(position) {
            return;
        }
        if self.is_settled(patience) {
            self.report.verified = Some(position);
            self.mirror();
            self.acknowledge();
        } else {
            self.unsettled = Some(position);
        }
    }

    /// True where the disk is not behind, or says so itself.
    fn is_settled(&self, patience: Duration) -> bool {
        self.cache.as_ref().is_none_or(|cache| cache.settled(patience))
    }

    /// Nothing counts as verified until everything has been compared again.
    fn unverified(&mut self, text: &str) {
        self.differing = self.differing.saturating_add(1);
        if self.differing >= STUBBORN {
            text.clone_into(&mut self.report.backend_error);
        }
        // What was verified before may be what differs.
        self.report.verified = None;
        self.recheck_at = Some(Instant::now() + pace::retry(self.differing));
        self.mirror();
        self.acknowledge();
    }

    /// Once what the backend wrote has been read back, the rules of other modes go: not before,
    /// so that there is no gap, and not after the ack, which would not be true.
    fn remove_others(&mut self) -> Result<(), String> {
        let Some(remove) = &mut self.remove_others else { return Ok(()) };
        if !self.backend.is_whole() {
            // They still serve the other family. Not for ever: nobody keeps them up to date, and they
            // translate for this one too.
            let since = *self.others_kept_since.get_or_insert_with(Instant::now);
            if since.elapsed() < KEEP_OTHERS {
                let text = "a family cannot be written yet, so rules of other modes stay for it";
                return Err(text.to_owned());
            }
        }
        if self.outdated {
            // They may be newer than what was programmed just now.
            return Err(
                "the cached state is outdated, so rules of other modes stay until a control plane is reached"
                    .to_owned(),
            );
        }
        let mut fault = None;
        for (interface, outcome) in remove() {
            match outcome {
                Ok(0) => {}
                Ok(objects) => {
                    self.metrics.other_modes_removed.inc_by(objects as u64);
                    tracing::warn!(%interface, objects, "removed the rules of a mode that is not in use any more");
                }
                Err(error) => {
                    let text = format!(
                        "rules of {interface}, a mode that is not in use, cannot be removed: {error:#}"
                    );
                    tracing::warn!("{text}");
                    fault.get_or_insert(text);
                }
            }
        }
        fault.map_or_else(
            || {
                self.remove_others = None;
                Ok(())
            },
            Err,
        )
    }

    /// Looks for changes that somebody else made, and for those nobody saw happen.
    pub(super) fn look_around(&mut self, now: Now) {
        if let Err(error) = self.backend.tend() {
            return self.refused(&error, None, None);
        }
        if self.pace.look_due(now.monotonic) {
            match self.backend.disturbed() {
                Ok(false) => {}
                Ok(true) => return self.repair("the kernel says that something changed"),
                Err(error) => return self.refused(&error, None, None),
            }
        }
        let Some(budget) = self.pace.audit_due(now.monotonic) else { return };
        let started = Instant::now();
        let result = self.backend.audit(budget);
        let done = Instant::now();
        match result {
            Ok(audit) => {
                self.pace.audited(done - started, audit.completed, done);
                if !audit.drift.is_empty() {
                    self.repair(&describe(&audit.drift));
                }
            }
            Err(error) => self.refused(&error, None, None),
        }
    }

    /// Compares everything and puts right what is not ours.
    fn repair(&mut self, why: &str) {
        let started = Instant::now();
        let applied = match self.backend.sync(self.view.plan()) {
            Ok(applied) => applied,
            Err(error) => {
                (self.report.verified, self.unsettled) = (None, None);
                return self.refused(&error, None, None);
            }
        };
        let now = Now::read();
        self.pace.compared(now.monotonic - started, now.monotonic);
        let objects = applied.objects_changed;
        let news = self.failures.passed(applied.failures, |_| true, now) | self.follow_up(None, now);
        self.accepted();
        self.status.update(|status| status.programmed = Some(now.wall));
        if objects == 0 {
            // Nobody touched what is ours. A read-back that is owed stays owed.
            if news {
                self.mirror();
                self.acknowledge();
            }
            return;
        }
        self.recheck_at = None;
        (self.report.verified, self.unsettled) = (None, None);
        self.report.drift_repairs += 1;
        self.metrics.drift_repairs.inc();
        self.metrics.objects_changed.inc_by(objects as u64);
        if self.repair_logged.is_none_or(|at| now.monotonic - at > REPAIR_LOG) {
            self.repair_logged = Some(now.monotonic);
            tracing::warn!(
                why,
                objects,
                repairs = self.report.drift_repairs,
                "somebody changed our kernel objects, they are as they should be again"
            );
        }
        self.mirror();
        if let Some(position) = self.report.applied {
            self.verify(position);
        }
    }

    /// The backend cannot do it as a whole: what is in force stays, and everything is compared
    /// when it is tried again.
    fn refused(&mut self, error: &BackendError, since: Option<Now>, trigger: Option<std::time::SystemTime>) {
        let now = Now::read();
        // What the backend knows of its own writes may be lost with this.
        self.unread = false;
        let wait = self.pace.refused(now.monotonic);
        self.metrics.backend_errors.inc();
        let text = chain(error);
        if self.report.backend_error != text {
            tracing::error!(
                cause = text,
                retry_in_ms = wait.as_millis(),
                "the backend refused, the kernel keeps what it has"
            );
            self.report.backend_error = text;
        }
        self.compare_everything(since.unwrap_or(now));
        self.pending.trigger = self.pending.trigger.or(trigger);
        self.acknowledge();
    }

    fn accepted(&mut self) {
        self.pace.accepted();
        if self.differing < STUBBORN {
            self.recovered();
        }
    }

    fn recovered(&mut self) {
        if !self.report.backend_error.is_empty() {
            tracing::info!("the backend works again");
            self.report.backend_error.clear();
        }
    }

    fn compare_everything(&mut self, since: Now) {
        self.pending.full = true;
        self.pending.wait(since);
        self.status.update(|status| {
            status.pending_since.get_or_insert(since.monotonic);
        });
    }

    /// Hands over to the cache what is in force by now.
    fn keep(&mut self, committed: Vec<Committed>) {
        if let Some(cache) = &mut self.cache
            && !committed.is_empty()
        {
            cache.record(committed, self.session.node(), self.session.state());
        }
    }
}

/// The first few differences.
fn describe(drift: &[Drift]) -> String {
    const SHOWN: usize = 3;
    let mut text = drift.iter().take(SHOWN).map(Drift::to_string).collect::<Vec<_>>().join("; ");
    if drift.len() > SHOWN {
        text = format!("{text}; and {} more", drift.len() - SHOWN);
    }
    text
}

/// An error with its causes, on one line.
fn chain(error: &BackendError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
