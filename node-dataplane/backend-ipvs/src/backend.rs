//! Changed Services: from what is in force of them to what should be.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lockstep_kernel::ipset::Entry;
use lockstep_kernel::ipvs::{Key, Request};
use lockstep_kernel::{Errno, netlink};
use lockstep_model::{Family, Feature, ServiceKey};
use lockstep_view::backend::FailureKind;
use lockstep_view::{ForwardingPlan, ServicePlan};
use lockstep_xtables::{ToolError, Watch};
use rustc_hash::{FxHashMap, FxHashSet};

use crate::chains::Chains;
use crate::change::{self, Change};
use crate::holdings::Moved;
use crate::names::Set;
use crate::options::Options;
use crate::read_back::Walk;
use crate::render::Rendered;
use crate::tables::{Refusal, Tables, refused};
use crate::terms::Terms;

/// IPVS, with ipsets and an interface for its addresses.
pub struct Ipvs {
    pub(crate) options: Options,
    pub(crate) tables: Tables,
    /// One per family that works.
    pub(crate) chains: Vec<Chains>,
    pub(crate) watch: Watch,
    pub(crate) features: Vec<Feature>,
    pub(crate) version: String,
    /// `None` before the first complete sync, and after a write that was broken off.
    pub(crate) terms: Option<Terms>,
    pub(crate) in_force: FxHashMap<ServiceKey, Arc<ServicePlan>>,
    pub(crate) left_out: BTreeMap<ServiceKey, LeftOut>,
    /// Whose each virtual server is.
    pub(crate) owners: FxHashMap<Key, ServiceKey>,
    /// What is to be read back; `None` = everything.
    pub(crate) touched: Option<Touched>,
    pub(crate) walk: Walk,
    /// Addresses of other interfaces, as of the last news.
    pub(crate) own: Option<Vec<IpAddr>>,
    /// There was news of addresses that nobody has looked into.
    pub(crate) news: bool,
    pub(crate) turn: Turn,
}

/// Where the look at draining endpoints goes on, and when it began last.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    from: Option<Key>,
    at: Option<Instant>,
}

/// Why a Service is not in force as planned.
#[derive(Debug, Clone)]
pub(crate) struct LeftOut {
    pub(crate) kind: FailureKind,
    pub(crate) message: String,
    pub(crate) previous_in_force: bool,
}

/// What a write touched.
#[derive(Debug, Default)]
pub(crate) struct Touched {
    pub(crate) keys: BTreeSet<Key>,
    pub(crate) entries: BTreeSet<(Set, Entry)>,
    pub(crate) addresses: BTreeSet<IpAddr>,
}

/// What is wrong with the whole.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    #[error(transparent)]
    Netlink(#[from] netlink::Error),
    #[error(transparent)]
    Tool(#[from] ToolError),
    #[error("{0}")]
    Unbound(String),
}

/// From one rendering of a Service to another.
#[derive(Debug)]
struct Step {
    key: ServiceKey,
    old: Rendered,
    new: Rendered,
    /// What `new` was rendered from.
    plan: Option<Arc<ServicePlan>>,
}

impl Ipvs {
    /// What a Service should be; an error where it cannot be that.
    pub(crate) fn wanted(&self, plan: &ServicePlan, terms: &Terms) -> Result<Rendered, LeftOut> {
        let unsupported =
            |message| LeftOut { kind: FailureKind::Unsupported, message, previous_in_force: false };
        if let Some(feature) = plan.lacking(&self.features) {
            return Err(unsupported(format!("needs {feature:?}, which IPVS cannot do here")));
        }
        Rendered::new(plan, terms).map_err(|error| unsupported(error.to_string()))
    }

    /// What is in force of a Service, as far as this process knows.
    pub(crate) fn rendered_in_force(&self, key: &ServiceKey, terms: &Terms) -> Rendered {
        let plan = self.in_force.get(key);
        plan.and_then(|plan| Rendered::new(plan, terms).ok()).unwrap_or_default()
    }

    pub(crate) fn leave_out(&mut self, key: &ServiceKey, left: LeftOut) {
        tracing::warn!(service = %key, message = %left.message, "left out");
        self.left_out.insert(key.clone(), left);
    }

    /// The terms by which Services are to be rendered now. Addresses are listed only where there is
    /// news of some: the list has all of ours in it.
    pub(crate) fn terms_now(&mut self, plan: &ForwardingPlan) -> Result<Terms, netlink::Error> {
        let news = self.tables.device.changed()?;
        self.news |= news;
        let own = match self.own.take().filter(|_| !news) {
            Some(own) => own,
            None => self.tables.device.others()?,
        };
        self.own = Some(own.clone());
        Ok(Terms::new(&self.options.scheduler, self.families(), &plan.node, own))
    }

    /// Those that work here.
    pub(crate) fn families(&self) -> Vec<Family> {
        self.chains.iter().map(|chains| chains.tool.family).collect()
    }

    /// Changed Services only. Returns the objects written.
    pub(crate) fn change(&mut self, plan: &ForwardingPlan, changed: &[ServiceKey]) -> Result<usize, Fault> {
        let mut now = self.terms_now(plan)?;
        if let Some(terms) = &self.terms {
            now.taken = Arc::clone(&terms.taken);
        }
        let takes = |plan: Option<&Arc<ServicePlan>>| plan.map(|plan| now.takes(plan)).unwrap_or_default();
        let moved = changed.iter().any(|key| takes(self.in_force.get(key)) != takes(plan.services.get(key)));
        let Some(terms) = self.terms.take().filter(|terms| *terms == now && !moved) else {
            return self.compare(plan);
        };
        let mut steps = Vec::with_capacity(changed.len());
        for key in changed {
            let new = match plan.services.get(key).map(|service| self.wanted(service, &terms)) {
                Some(Err(left)) => {
                    let before = self.left_out.get(key).is_some_and(|left| left.previous_in_force);
                    let previous_in_force = before || self.in_force.contains_key(key);
                    self.leave_out(key, LeftOut { previous_in_force, ..left });
                    continue;
                }
                Some(Ok(new)) => new,
                None => Rendered::default(),
            };
            let left = self.left_out.remove(key);
            if left.is_some_and(|left| left.previous_in_force) && !self.in_force.contains_key(key) {
                // An earlier process wrote what is there of it: only the kernel knows what that is.
                return self.compare(plan);
            }
            let old = self.rendered_in_force(key, &terms);
            steps.push(Step { key: key.clone(), old, new, plan: plan.services.get(key).cloned() });
        }
        self.give_way(&mut steps, &terms);
        hand_over(&mut steps);
        self.touched.get_or_insert_default();
        // `None` = memory and kernel disagree.
        let Some(written) = self.write(&steps)? else { return self.compare(plan) };
        self.terms = Some(terms);
        Ok(written)
    }

    /// A Service that is left out keeps what it has, but for what the plan gives to another by now:
    /// then all of it goes.
    fn give_way(&mut self, steps: &mut Vec<Step>, terms: &Terms) {
        if self.left_out.is_empty() {
            return;
        }
        let claimed = steps.iter().flat_map(|step| &step.new.servers);
        let owners = claimed.filter_map(|server| self.owners.get(&server.server.key));
        let giving: BTreeSet<ServiceKey> =
            owners.filter(|owner| self.left_out.contains_key(*owner)).cloned().collect();
        for key in giving {
            let old = self.rendered_in_force(&key, terms);
            if let Some(left) = self.left_out.get_mut(&key) {
                left.previous_in_force = false;
            }
            steps.push(Step { key, old, new: Rendered::default(), plan: None });
        }
    }

    /// Brings the kernel from what is in force of these Services to what should be. `None` = it
    /// holds something else than memory says, so everything has to be compared.
    fn write(&mut self, steps: &[Step]) -> Result<Option<usize>, Fault> {
        let (mut came, mut gone) = (Moved::default(), Moved::default());
        let (mut requests, mut owners, mut changes) = (Vec::new(), Vec::new(), Vec::new());
        for (at, step) in steps.iter().enumerate() {
            let mut change = change::between(&step.old, &step.new, &mut self.tables.drains);
            owners.extend(std::iter::repeat_n(at, change.first.len()));
            requests.append(&mut change.first);
            changes.push(change);
            self.tables.holdings.take(&step.new, &mut came);
        }
        self.tables.enter(&came.entries)?;
        let refusals = self.tables.commit(&requests)?;
        if refusals.iter().any(|refusal| disagrees(&requests, refusal)) {
            return Ok(None);
        }
        let had = |at| steps.get(at).is_some_and(|step: &Step| !step.old.is_empty());
        let mut refused = blame(&requests, &owners, &refusals, had);
        let unbindable = self.tables.bind(&came.addresses)?;
        for (at, step) in steps.iter().enumerate().filter(|_| !unbindable.is_empty()) {
            if let Some(left) = not_bound(&step.new, &unbindable) {
                refused.entry(at).or_insert(LeftOut { previous_in_force: had(at), ..left });
            }
        }

        let (mut leaving, mut back) = (Vec::new(), Vec::new());
        // What each Service loses; of a Service that was refused what was written of it, and what
        // it had stays.
        let mut losses: Vec<&Rendered> = Vec::new();
        for (at, (step, change)) in steps.iter().zip(changes).enumerate() {
            change.revived.iter().for_each(|ghost| self.tables.holdings.release(&ghost.kept, &mut gone));
            if refused.contains_key(&at) {
                let Change { first, leaving: left, .. } =
                    change::between(&step.new, &step.old, &mut self.tables.drains);
                back.extend(first.into_iter().filter(|request| matches!(request, Request::Set(_))));
                leaving.extend(left);
                losses.push(&step.new);
            } else {
                leaving.extend(change.leaving);
                losses.push(&step.old);
            }
        }
        let whose: FxHashMap<Key, &Rendered> = losses
            .iter()
            .flat_map(|loss| loss.servers.iter().map(|server| (server.server.key, *loss)))
            .collect();
        self.tables.commit(&back)?;
        let suspects: FxHashSet<Key> = refused
            .keys()
            .filter_map(|at| steps.get(*at))
            .flat_map(|step| step.new.servers.iter().map(|server| server.server.key))
            .collect();
        let keep = |key| whose.get(&key).map(|loss| loss.of_key(key)).unwrap_or_default();
        let removals = self.tables.quiesce(&leaving, keep, &suspects, Instant::now())?;
        losses.iter().for_each(|loss| self.tables.holdings.release(loss, &mut gone));
        gone.addresses.retain(|ip| !unbindable.contains_key(ip));
        self.tables.unbind(&gone.addresses)?;
        self.note(requests.iter().chain(&back).chain(&removals), &[&came, &gone]);
        let gone_objects = gone.len();
        let behind = self.tables.close(gone.entries)?;
        self.tables.commit_all(&removals, &suspects)?;
        self.tables.withdraw(&behind)?;

        self.note_keys(leaving.iter().map(|leaving| leaving.server.key));
        let objects = requests.len() + back.len() + removals.len() + came.len() + gone_objects;
        for (at, step) in steps.iter().enumerate() {
            match refused.get(&at) {
                Some(left) => self.leave_out(&step.key, left.clone()),
                None => self.enforce(step),
            }
        }
        Ok(Some(objects))
    }

    /// Remembers that a Service is in force.
    fn enforce(&mut self, step: &Step) {
        for server in &step.old.servers {
            if self.owners.get(&server.server.key) == Some(&step.key) {
                self.owners.remove(&server.server.key);
            }
        }
        self.own(&step.key, &step.new);
        match &step.plan {
            Some(plan) => drop(self.in_force.insert(step.key.clone(), Arc::clone(plan))),
            None => drop(self.in_force.remove(&step.key)),
        }
    }

    pub(crate) fn own(&mut self, key: &ServiceKey, rendered: &Rendered) {
        self.owners.extend(rendered.servers.iter().map(|server| (server.server.key, key.clone())));
    }

    fn note<'a>(&mut self, requests: impl Iterator<Item = &'a Request>, moved: &[&Moved]) {
        let Some(touched) = &mut self.touched else { return };
        touched.keys.extend(requests.map(Request::key));
        for moved in moved {
            touched.addresses.extend(&moved.addresses);
            for (set, entries) in &moved.entries {
                touched.entries.extend(entries.iter().map(|entry| (*set, *entry)));
            }
        }
    }

    fn note_keys(&mut self, keys: impl Iterator<Item = Key>) {
        if let Some(touched) = &mut self.touched {
            touched.keys.extend(keys);
        }
    }

    /// Removes what has drained: at most every second, and some at a time.
    pub(crate) fn drain(&mut self, now: Instant) -> Result<(), netlink::Error> {
        /// Virtual servers that are looked at in one go.
        const AT_ONCE: usize = 256;
        const EVERY: Duration = Duration::from_secs(1);
        if self.terms.is_none() || self.turn.at.is_some_and(|at| now < at + EVERY) {
            return Ok(());
        }
        self.turn.at = Some(now);
        let all = self.tables.drains.keys();
        let begin = self.turn.from.map_or(0, |from| all.partition_point(|key| *key < from));
        let turn: Vec<Key> = all.iter().skip(begin).take(AT_ONCE).copied().collect();
        self.turn.from = all.get(begin + AT_ONCE).copied();
        self.tables.drain(&turn, now).map(drop)
    }
}

/// What one Service gives up and another has now does not leave: it goes from what the one has to
/// what the other has.
fn hand_over(steps: &mut [Step]) {
    let mut wanted: FxHashMap<Key, usize> = FxHashMap::default();
    for (at, step) in steps.iter().enumerate() {
        let new = step.new.servers.iter().map(|server| server.server.key);
        wanted.extend(new.filter(|key| step.old.server(*key).is_none()).map(|key| (key, at)));
    }
    let mut handed = Vec::new();
    for step in steps.iter_mut() {
        let new = &step.new;
        step.old.servers.retain(|server| {
            let key = server.server.key;
            let taker = wanted.get(&key).filter(|_| new.server(key).is_none());
            handed.extend(taker.map(|taker| (*taker, server.clone())));
            taker.is_none()
        });
    }
    for (taker, server) in handed {
        let servers = &mut steps[taker].old.servers;
        let at = servers.partition_point(|other| other.server.key < server.server.key);
        servers.insert(at, server);
    }
}

/// True for a refusal that says that the kernel holds something else than was thought.
fn disagrees(requests: &[Request], refusal: &Refusal) -> bool {
    match requests.get(refusal.index) {
        Some(Request::Add(_) | Request::AddReal(..)) => refusal.errno == Errno::EXIST,
        Some(Request::Set(_)) => refusal.errno == Errno::SRCH,
        Some(Request::SetReal(..)) => crate::tables::is_gone(refusal.errno),
        _ => false,
    }
}

/// Who was refused something, and the first thing that was. `had`: something of it was in force.
pub(crate) fn blame(
    requests: &[Request],
    owners: &[usize],
    refusals: &[Refusal],
    had: impl Fn(usize) -> bool,
) -> BTreeMap<usize, LeftOut> {
    let mut blamed = BTreeMap::new();
    for refusal in refusals {
        let Some(owner) = owners.get(refusal.index) else { continue };
        blamed.entry(*owner).or_insert_with(|| LeftOut {
            kind: match refusal.errno {
                errno if errno.is_resources() => FailureKind::Resources,
                _ => FailureKind::Kernel,
            },
            message: error_text(&refused(requests, refusal)),
            previous_in_force: had(*owner),
        });
    }
    blamed
}

/// Why a Service is not in force of which an address could not be bound; `None` = all could.
pub(crate) fn not_bound(rendered: &Rendered, refused: &BTreeMap<IpAddr, Errno>) -> Option<LeftOut> {
    let (ip, errno) = rendered.addresses.iter().find_map(|ip| Some((ip, refused.get(ip)?)))?;
    let message = format!("bind {ip} to {}: {errno}", crate::names::DEVICE);
    Some(LeftOut { kind: FailureKind::Kernel, message, previous_in_force: false })
}

/// An error with its causes.
pub(crate) fn error_text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
