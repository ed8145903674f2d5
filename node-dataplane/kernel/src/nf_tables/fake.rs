//! nf_tables in memory: the same messages in, the same answers out.
//!
//! It models the kernel and not the calls: a transaction is made on a copy and thrown away
//! where any message is refused; what exists cannot be added, what is missing or in use
//! cannot be deleted, and full sets refuse. What it does not model is validation of
//! expressions.

use std::collections::{BTreeMap, VecDeque};

use super::batch::put_message;
use super::{CommitError, Dumped, Expression, Lifetime, Netfilter, Verdict};
use crate::Errno;
use crate::netlink::attr::{self, Attributes};
use crate::netlink::{Error, Message, Messages, Refusal};

/// A fault that happens once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The next transaction is not accepted at all.
    Send(Errno),
    /// The next transaction fails as a whole, after all messages were taken.
    Commit(Errno),
    /// The next dump is interrupted.
    InterruptedDump,
    /// The next dump fails.
    Dump(Errno),
    /// Notifications are lost.
    LostNotifications,
}

/// nf_tables in memory.
#[derive(Debug, Default)]
pub struct FakeKernel {
    tables: Tables,
    generation: u32,
    faults: VecDeque<Fault>,
    refused: Vec<(Vec<u8>, Errno)>,
    listening: bool,
    heard: Vec<Vec<u8>>,
    commits: usize,
}

type Tables = BTreeMap<(u8, String), Table>;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Table {
    /// Attributes of each chain as they were given, and of its rules.
    chains: BTreeMap<String, (Vec<u8>, Vec<Vec<u8>>)>,
    sets: BTreeMap<String, FakeSet>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct FakeSet {
    attributes: Vec<u8>,
    size: usize,
    /// Key, and last key of a range or the mark of an end, to the element's attributes.
    elements: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl FakeKernel {
    /// A kernel without tables.
    pub fn new() -> Self {
        Self { generation: 1, ..Self::default() }
    }

    /// Lets a fault happen at its next occasion.
    pub fn fail_once(&mut self, fault: Fault) {
        self.faults.push_back(fault);
    }

    /// Refuses every element with this key that is to be added, from now on.
    pub fn refuse_key(&mut self, key: &[u8], errno: Errno) {
        self.refused.push((key.to_owned(), errno));
    }

    /// Refuses nothing any more.
    pub fn refuse_nothing(&mut self) {
        self.refused.clear();
    }

    /// How many transactions were made.
    pub fn commits(&self) -> usize {
        self.commits
    }

    /// Elements of a set, key to attributes; empty where there is none.
    pub fn elements(&self, family: super::Family, table: &str, set: &str) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let table = self.tables.get(&(family as u8, table.to_owned()));
        table.and_then(|table| table.sets.get(set)).map(|set| set.elements.clone()).unwrap_or_default()
    }

    /// What a packet taught a map of this: it may have more time left than there is in all, as a kernel leaves
    /// it where the time of a rule was made longer.
    pub fn learn(&mut self, map: (super::Family, &str, &str), key: &[u8], data: &[u8], lifetime: Lifetime) {
        let (family, table, set) = map;
        let table = self.tables.get_mut(&(family as u8, table.to_owned()));
        let Some(set) = table.and_then(|table| table.sets.get_mut(set)) else { return };
        let mut element = Vec::new();
        super::put_passing(&mut element, key, data, lifetime);
        set.elements.insert(key.to_owned(), element.split_off(attr::HEADER));
    }

    /// Somebody else's transaction.
    pub fn disturb(&mut self, batch: &[u8]) -> Result<(), CommitError> {
        self.transaction(batch)
    }

    fn take(&mut self, wanted: impl Fn(Fault) -> bool) -> Option<Fault> {
        let position = self.faults.iter().position(|fault| wanted(*fault))?;
        self.faults.remove(position)
    }

    fn transaction(&mut self, batch: &[u8]) -> Result<(), CommitError> {
        let mut tables = self.tables.clone();
        let mut refusals = Vec::new();
        let mut notices = Vec::new();
        for message in Messages::of(batch).filter(|message| message.kind >> 8 == 10) {
            match self.one(&mut tables, &message) {
                Ok(()) => notices.push((message.kind, message.payload.to_owned())),
                Err(errno) => refusals.push(Refusal { seq: message.seq, errno, message: None }),
            }
        }
        if !refusals.is_empty() {
            return Err(CommitError::Refused(refusals));
        }
        if let Some(Fault::Commit(errno)) = self.take(|fault| matches!(fault, Fault::Commit(_))) {
            return Err(CommitError::Refused(vec![Refusal { seq: 0, errno, message: None }]));
        }
        self.tables = tables;
        self.generation += 1;
        self.commits += 1;
        if self.listening {
            for (kind, payload) in notices {
                let mut out = Vec::new();
                let kind = libc::c_int::from(kind & 0xff);
                put_message(&mut out, kind, 0, payload[0], 0, |out| out.extend_from_slice(&payload[4..]));
                self.heard.push(out);
            }
            let mut end = Vec::new();
            put_message(&mut end, libc::NFT_MSG_NEWGEN, 0, 0, 0, |out| {
                attr::put_u32_be(out, 1, self.generation);
            });
            self.heard.push(end);
        }
        Ok(())
    }

    /// One message of a transaction.
    fn one(&self, tables: &mut Tables, message: &Message<'_>) -> Result<(), Errno> {
        let family = *message.payload.first().ok_or(Errno::INVAL)?;
        let raw = message.payload.get(4..).unwrap_or_default();
        let all = Attributes::of(raw);
        let text = |kind| all.get(kind).map(|name| name.text().to_owned()).ok_or(Errno::INVAL);
        let id = (family, text(1)?);
        let kind = libc::c_int::from(message.kind & 0xff);
        if kind == libc::NFT_MSG_NEWTABLE {
            tables.entry(id).or_default();
            return Ok(());
        }
        if kind == libc::NFT_MSG_DELTABLE {
            return tables.remove(&id).map(drop).ok_or(Errno::NOENT);
        }
        let table = tables.get_mut(&id).ok_or(Errno::NOENT)?;
        match kind {
            libc::NFT_MSG_NEWCHAIN => add(&mut table.chains, text(3)?, (raw.to_owned(), Vec::new())),
            libc::NFT_MSG_DELCHAIN => {
                let name = text(3)?;
                let (_, rules) = table.chains.remove(&name).ok_or(Errno::NOENT)?;
                drop(rules);
                if table.leads_to(&name) { Err(Errno::BUSY) } else { Ok(()) }
            }
            libc::NFT_MSG_NEWRULE => {
                for chain in led_to(raw) {
                    table.chains.get(&chain).ok_or(Errno::NOENT)?;
                }
                let (_, rules) = table.chains.get_mut(&text(2)?).ok_or(Errno::NOENT)?;
                rules.push(raw.to_owned());
                Ok(())
            }
            libc::NFT_MSG_DELRULE => {
                let (_, rules) = table.chains.get_mut(&text(2)?).ok_or(Errno::NOENT)?;
                rules.clear();
                Ok(())
            }
            libc::NFT_MSG_NEWSET => {
                let size = all.get(9).and_then(|description| description.nested().get(1));
                let size = size.map_or(usize::MAX, |size| size.u32_be() as usize);
                let set = FakeSet { attributes: raw.to_owned(), size, elements: BTreeMap::new() };
                add(&mut table.sets, text(2)?, set)
            }
            libc::NFT_MSG_NEWSETELEM | libc::NFT_MSG_DELSETELEM => {
                for element in all.get(3).ok_or(Errno::INVAL)?.nested() {
                    self.element(table, &text(2)?, element.value, kind == libc::NFT_MSG_NEWSETELEM)?;
                }
                Ok(())
            }
            _ => Err(Errno::INVAL),
        }
    }

    fn element(&self, table: &mut Table, set: &str, element: &[u8], is_new: bool) -> Result<(), Errno> {
        let decoded = super::Element::decode(&Attributes::of(element)).ok_or(Errno::INVAL)?;
        let end = if decoded.ends_interval { &[1][..] } else { decoded.key_end.unwrap_or_default() };
        let key = [decoded.key, end].concat();
        let chain = decoded.verdict().and_then(|(_, chain)| chain);
        if is_new && chain.is_some_and(|chain| !table.chains.contains_key(chain)) {
            return Err(Errno::NOENT);
        }
        let set = table.sets.get_mut(set).ok_or(Errno::NOENT)?;
        if !is_new {
            return set.elements.remove(&key).map(drop).ok_or(Errno::NOENT);
        }
        if let Some((_, errno)) = self.refused.iter().find(|(refused, _)| *refused == decoded.key) {
            return Err(*errno);
        }
        if decoded.lifetime.is_some_and(|lifetime| lifetime.left > lifetime.timeout) {
            return Err(Errno(libc::ERANGE));
        }
        if set.elements.len() >= set.size {
            return Err(Errno::NFILE);
        }
        add(&mut set.elements, key, element.to_owned())
    }
}

impl Table {
    /// True where an element or a rule leads to the chain.
    fn leads_to(&self, chain: &str) -> bool {
        let by_rule = self.chains.values().flat_map(|(_, rules)| rules).flat_map(|rule| led_to(rule));
        let by_element = self.sets.values().flat_map(|set| set.elements.values()).filter_map(|element| {
            let element = super::Element::decode(&Attributes::of(element))?;
            element.verdict()?.1.map(str::to_owned)
        });
        by_rule.chain(by_element).any(|name| name == chain)
    }
}

/// Adds what must not be there.
fn add<K: Ord, V>(map: &mut BTreeMap<K, V>, key: K, value: V) -> Result<(), Errno> {
    match map.entry(key) {
        std::collections::btree_map::Entry::Vacant(entry) => {
            entry.insert(value);
            Ok(())
        }
        std::collections::btree_map::Entry::Occupied(_) => Err(Errno::EXIST),
    }
}

/// The chains that a rule leads to.
fn led_to(rule: &[u8]) -> Vec<String> {
    let expressions = Attributes::of(rule).get(4);
    expressions
        .into_iter()
        .flat_map(|list| list.nested())
        .filter_map(|one| match Expression::decode(&one.nested())? {
            Expression::Verdict(Verdict::Goto(chain) | Verdict::Jump(chain)) => Some(chain),
            _ => None,
        })
        .collect()
}

fn hand_on(bytes: &[u8], each: &mut dyn FnMut(Message<'_>)) {
    Messages::of(bytes).for_each(&mut *each);
}

/// An error message as the kernel sends it.
fn error(errno: Errno) -> Vec<u8> {
    let mut out = Vec::new();
    let body = 4 + crate::netlink::HEADER;
    out.extend_from_slice(&u32::try_from(16 + body).unwrap_or_default().to_ne_bytes());
    out.extend_from_slice(&u16::try_from(libc::NLMSG_ERROR).unwrap_or_default().to_ne_bytes());
    out.resize(16, 0);
    out.extend_from_slice(&errno.0.wrapping_neg().to_ne_bytes());
    out.resize(16 + body, 0);
    out
}

impl Netfilter for FakeKernel {
    fn commit(&mut self, batch: &[u8]) -> Result<(), CommitError> {
        if let Some(Fault::Send(errno)) = self.take(|fault| matches!(fault, Fault::Send(_))) {
            return Err(Error::Call { call: "send", errno }.into());
        }
        if batch.is_empty() { Ok(()) } else { self.transaction(batch) }
    }

    fn dump(&mut self, request: &[u8], each: &mut dyn FnMut(Message<'_>)) -> Result<Dumped, Error> {
        if let Some(Fault::Dump(errno)) = self.take(|fault| matches!(fault, Fault::Dump(_))) {
            return Err(Error::Refused { request: "dump".to_owned(), message: None, errno });
        }
        let Some(request) = Messages::of(request).next() else { return Ok(Dumped::Whole) };
        let family = request.payload[0];
        let names = Attributes::of(&request.payload[4..]);
        let name = |kind| names.get(kind).map(|name| name.text().to_owned()).unwrap_or_default();
        let missing = || Error::Refused { request: "dump".to_owned(), message: None, errno: Errno::NOENT };
        let table = self.tables.get(&(family, name(1))).ok_or_else(missing)?;
        let mut out = Vec::new();
        let mut put = |kind, body: &[u8]| {
            put_message(&mut out, kind, 0, family, 1, |out| out.extend_from_slice(body));
        };
        match libc::c_int::from(request.kind & 0xff) {
            libc::NFT_MSG_GETCHAIN => {
                table.chains.values().for_each(|(chain, _)| put(libc::NFT_MSG_NEWCHAIN, chain));
            }
            libc::NFT_MSG_GETRULE => {
                let rules = table.chains.values().flat_map(|(_, rules)| rules);
                rules.for_each(|rule| put(libc::NFT_MSG_NEWRULE, rule));
            }
            libc::NFT_MSG_GETSET => {
                table.sets.values().for_each(|set| put(libc::NFT_MSG_NEWSET, &set.attributes));
            }
            libc::NFT_MSG_GETSETELEM => {
                let set = table.sets.get(&name(2)).ok_or_else(missing)?;
                set.elements.values().for_each(|element| {
                    put(libc::NFT_MSG_NEWSETELEM, &listed(&name(1), &name(2), element));
                });
            }
            _ => {}
        }
        hand_on(&out, each);
        let interrupted = self.take(|fault| fault == Fault::InterruptedDump).is_some();
        Ok(if interrupted { Dumped::Interrupted } else { Dumped::Whole })
    }

    fn ask(
        &mut self,
        requests: &[u8],
        _count: usize,
        each: &mut dyn FnMut(Message<'_>),
    ) -> Result<(), Error> {
        for request in Messages::of(requests) {
            let family = request.payload[0];
            let all = Attributes::of(&request.payload[4..]);
            let name = |kind| all.get(kind).map(|name| name.text().to_owned()).unwrap_or_default();
            let table = self.tables.get(&(family, name(1)));
            let reply = match libc::c_int::from(request.kind & 0xff) {
                libc::NFT_MSG_GETGEN => {
                    let mut body = Vec::new();
                    attr::put_u32_be(&mut body, 1, self.generation);
                    Some((libc::NFT_MSG_NEWGEN, body))
                }
                libc::NFT_MSG_GETTABLE => table.map(|_| (libc::NFT_MSG_NEWTABLE, Vec::new())),
                _ => {
                    let element = all.get(3).and_then(|list| list.nested().next());
                    let key = element.and_then(|element| {
                        super::Element::decode(&element.nested()).map(|element| element.key.to_owned())
                    });
                    let set = table.and_then(|table| table.sets.get(&name(2)));
                    let found = key.and_then(|key| set?.elements.get(&key));
                    found.map(|found| (libc::NFT_MSG_NEWSETELEM, listed(&name(1), &name(2), found)))
                }
            };
            match reply {
                None => hand_on(&error(Errno::NOENT), each),
                Some((kind, body)) => {
                    let mut out = Vec::new();
                    put_message(&mut out, kind, 0, family, 1, |out| out.extend_from_slice(&body));
                    hand_on(&out, each);
                }
            }
        }
        Ok(())
    }

    fn listen(&mut self, on: bool) -> Result<(), Error> {
        self.listening = on;
        Ok(())
    }

    fn heard(&mut self, each: &mut dyn FnMut(Message<'_>)) -> Result<bool, Error> {
        for message in std::mem::take(&mut self.heard) {
            hand_on(&message, each);
        }
        Ok(self.take(|fault| fault == Fault::LostNotifications).is_none())
    }
}

/// One element as the kernel lists it.
fn listed(table: &str, set: &str, element: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    attr::put_text(&mut body, 1, table);
    attr::put_text(&mut body, 2, set);
    attr::put_nest(&mut body, 3, attr::HEADER + attr::aligned(element.len()));
    attr::put_nest(&mut body, 1, element.len());
    body.extend_from_slice(element);
    body
}
