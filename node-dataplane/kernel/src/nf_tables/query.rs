//! Reading the kernel's objects back.

use super::batch::put_message;
use super::{
    Chain, ChainKind, Dumped, Element, Expression, Family, Hook, HookPoint, Netfilter, Rule, Set, Value,
};
use crate::Errno;
use crate::netlink::attr::{self, Attributes};
use crate::netlink::{Error, Message, Refusal};

/// A dump that other changes interrupt is repeated this often.
const ATTEMPTS: u32 = 16;
/// Element requests per datagram: their replies must fit the receive queue.
const GETS: usize = 256;

/// A step of a dump.
#[derive(Debug)]
pub enum Step<'a> {
    /// Forget what came before: the dump begins (again).
    Begin,
    /// One element.
    Element(Element<'a>),
}

/// The attributes after the family header.
fn attributes<'a>(message: &Message<'a>) -> Attributes<'a> {
    Attributes::of(message.payload.get(4..).unwrap_or_default())
}

fn request(kind: libc::c_int, flags: libc::c_int, family: Family, names: &[(u16, &str)]) -> Vec<u8> {
    let mut out = Vec::with_capacity(128);
    put_message(&mut out, kind, flags, family as u8, 1, |out| {
        for (kind, name) in names {
            attr::put_text(out, *kind, name);
        }
    });
    out
}

fn repeat(
    netfilter: &mut dyn Netfilter,
    what: &str,
    request: &[u8],
    each: &mut dyn FnMut(Option<Message<'_>>),
) -> Result<(), Error> {
    for _ in 0..ATTEMPTS {
        each(None);
        match netfilter.dump(request, &mut |message| each(Some(message))) {
            Ok(Dumped::Whole) => return Ok(()),
            Ok(Dumped::Interrupted) => {}
            Err(Error::Refused { message, errno, .. }) => {
                return Err(Error::Refused { request: what.to_owned(), message, errno });
            }
            Err(other) => return Err(other),
        }
    }
    Err(Error::Interrupted { request: what.to_owned(), times: ATTEMPTS })
}

/// Dumps objects of one table and collects what `decode` makes of them.
fn collect<T>(
    netfilter: &mut dyn Netfilter,
    kind: libc::c_int,
    what: &str,
    family: Family,
    table: &str,
    decode: impl Fn(&Attributes<'_>) -> Option<T>,
) -> Result<Vec<T>, Error> {
    let request = request(kind, libc::NLM_F_DUMP, family, &[(1, table)]);
    let mut found = Vec::new();
    let result = repeat(netfilter, what, &request, &mut |message| match message {
        None => found.clear(),
        Some(message) => {
            let attributes = attributes(&message);
            if attributes.get(1).is_some_and(|name| name.text() == table) {
                found.extend(decode(&attributes));
            }
        }
    });
    match result {
        // No such table: nothing in it.
        Err(error) if error.errno() == Some(Errno::NOENT) => Ok(Vec::new()),
        Err(error) => Err(error),
        Ok(()) => Ok(found),
    }
}

/// True where the table exists.
pub fn table_exists(netfilter: &mut dyn Netfilter, family: Family, table: &str) -> Result<bool, Error> {
    let request = request(libc::NFT_MSG_GETTABLE, 0, family, &[(1, table)]);
    exists(netfilter, &request, || format!("get table {} {table}", family.word()))
}

/// True where the table exists and has the chain.
pub fn chain_exists(
    netfilter: &mut dyn Netfilter,
    family: Family,
    table: &str,
    chain: &str,
) -> Result<bool, Error> {
    let request = request(libc::NFT_MSG_GETCHAIN, 0, family, &[(1, table), (3, chain)]);
    exists(netfilter, &request, || format!("get chain {} {table} {chain}", family.word()))
}

/// Asks for one object.
fn exists(netfilter: &mut dyn Netfilter, request: &[u8], what: impl Fn() -> String) -> Result<bool, Error> {
    let mut outcome = Ok(true);
    netfilter.ask(request, 1, &mut |message| {
        if let Some(Refusal { errno, message, .. }) = message.refusal() {
            outcome = match errno {
                Errno::NOENT => Ok(false),
                errno => Err(Error::Refused { request: what(), message, errno }),
            };
        }
    })?;
    outcome
}

/// The chains of a table.
pub fn chains(netfilter: &mut dyn Netfilter, family: Family, table: &str) -> Result<Vec<Chain>, Error> {
    collect(netfilter, libc::NFT_MSG_GETCHAIN, "list chains", family, table, |chain| {
        let hook = chain.get(4).and_then(|hook| {
            let hook = hook.nested();
            Some(Hook {
                kind: match chain.get(7)?.text() {
                    "nat" => ChainKind::Nat,
                    "filter" => ChainKind::Filter,
                    _ => return None,
                },
                point: match hook.get(1)?.u32_be() {
                    0 => HookPoint::Prerouting,
                    1 => HookPoint::Input,
                    2 => HookPoint::Forward,
                    3 => HookPoint::Output,
                    4 => HookPoint::Postrouting,
                    _ => return None,
                },
                priority: hook.get(2)?.u32_be().cast_signed(),
            })
        });
        Some(Chain { name: chain.get(3)?.text().to_owned(), hook })
    })
}

/// The rules of a table, chain by chain, in order.
pub fn rules(netfilter: &mut dyn Netfilter, family: Family, table: &str) -> Result<Vec<Rule>, Error> {
    collect(netfilter, libc::NFT_MSG_GETRULE, "list rules", family, table, |rule| {
        let expressions = rule.get(4).map(|list| {
            list.nested().filter_map(|expression| Expression::decode(&expression.nested())).collect()
        });
        Some(Rule { chain: rule.get(2)?.text().to_owned(), expressions: expressions.unwrap_or_default() })
    })
}

/// The sets and maps of a table.
pub fn sets(netfilter: &mut dyn Netfilter, family: Family, table: &str) -> Result<Vec<Set>, Error> {
    collect(netfilter, libc::NFT_MSG_GETSET, "list sets", family, table, |set| {
        let number = |kind| set.get(kind).map(|attribute| attribute.u32_be());
        let description = set.get(9).map(|description| description.nested());
        let size = description.as_ref().and_then(|all| all.get(1)).map_or(0, |size| size.u32_be());
        let fields = description.and_then(|all| all.get(2)).map(|fields| {
            fields.nested().filter_map(|field| Some(field.nested().get(1)?.u32_be())).collect()
        });
        Some(Set {
            name: set.get(2)?.text().to_owned(),
            flags: number(3).unwrap_or(0) & !Set::MAP,
            key_type: number(4)?,
            key_length: number(5)?,
            data: number(6).map(|kind| (kind, number(7).unwrap_or(0))),
            size,
            fields: fields.unwrap_or_default(),
            userdata: set.get(13).map_or_else(Vec::new, |data| data.value.to_owned()),
        })
    })
}

/// Walks the elements of a set or map. A set that does not exist has none.
pub fn elements(
    netfilter: &mut dyn Netfilter,
    family: Family,
    table: &str,
    set: &str,
    each: &mut dyn FnMut(Step<'_>),
) -> Result<(), Error> {
    let request = request(libc::NFT_MSG_GETSETELEM, libc::NLM_F_DUMP, family, &[(1, table), (2, set)]);
    let result = repeat(netfilter, "list elements", &request, &mut |message| match message {
        None => each(Step::Begin),
        Some(message) => {
            let list = attributes(&message).get(3);
            for element in list.into_iter().flat_map(|list| list.nested()) {
                if let Some(element) = Element::decode(&element.nested()) {
                    each(Step::Element(element));
                }
            }
        }
    });
    match result {
        Err(error) if error.errno() == Some(Errno::NOENT) => Ok(()),
        other => other,
    }
}

/// What a set or map says about keys, one by one: `None` where it lacks the key,
/// `Some(None)` where it is a set and has it.
pub fn element_values(
    netfilter: &mut dyn Netfilter,
    family: Family,
    table: &str,
    set: &str,
    keys: &[&[u8]],
) -> Result<Vec<Option<Option<Value>>>, Error> {
    let mut found = Vec::with_capacity(keys.len());
    let mut fault = None;
    for keys in keys.chunks(GETS) {
        let mut requests = Vec::with_capacity(keys.len() * 96);
        for key in keys {
            put_message(&mut requests, libc::NFT_MSG_GETSETELEM, 0, family as u8, 1, |out| {
                attr::put_text(out, 1, table);
                attr::put_text(out, 2, set);
                let start = out.len();
                attr::put_nest(out, 3, 0);
                super::put_key(out, key);
                let length = u16::try_from(out.len() - start).unwrap_or(u16::MAX);
                out[start..start + 2].copy_from_slice(&length.to_ne_bytes());
            });
        }
        netfilter.ask(&requests, keys.len(), &mut |message| match message.refusal() {
            Some(refusal) if refusal.errno == Errno::NOENT => found.push(None),
            Some(refusal) => {
                found.push(None);
                fault.get_or_insert(refusal);
            }
            None => {
                let element = attributes(&message).get(3).and_then(|list| {
                    Element::decode(&list.nested().next()?.nested()).map(|element| element.value())
                });
                found.push(element);
            }
        })?;
    }
    match fault {
        None => Ok(found),
        Some(refusal) => Err(Error::Refused {
            request: format!("get elements of {} {table} {set}", family.word()),
            message: refusal.message,
            errno: refusal.errno,
        }),
    }
}

/// The number of the last transaction in this namespace, anybody's.
pub fn generation(netfilter: &mut dyn Netfilter) -> Result<u32, Error> {
    let mut request = Vec::with_capacity(32);
    put_message(&mut request, libc::NFT_MSG_GETGEN, 0, 0, 1, |_| {});
    let mut generation = None;
    netfilter.ask(&request, 1, &mut |message| {
        generation = attributes(&message).get(1).map(|id| id.u32_be());
    })?;
    generation.ok_or(Error::Malformed { what: "no generation" })
}
