//! What nft keeps beside a set so that it can list it: byte orders, and for maps to values
//! the expressions behind key and data, because `numgen` has no plain type name.
//!
//! The format is nft's own: records of type, length, value, nested in places.

use lockstep_model::Family;

use crate::sets::{Data, Field, SetId};

const KEY_BYTE_ORDER: u8 = 0;
const DATA_BYTE_ORDER: u8 = 1;
const KEY_TYPEOF: u8 = 3;
const DATA_TYPEOF: u8 = 4;
const DATA_INTERVAL: u8 = 6;
/// Records of an expression: its kind, and what the kind needs.
const KIND: u8 = 0;
const BODY: u8 = 1;
/// Kinds of expressions in nft.
const PAYLOAD: u32 = 7;
const META: u32 = 9;
const CONCAT: u32 = 13;
const NUMGEN: u32 = 23;
/// Byte orders in nft.
const MIXED: u32 = 0;
const HOST: u32 = 1;
const BIG_ENDIAN: u32 = 2;

/// The user data of a set.
pub(crate) fn of(set: SetId, family: Family) -> Vec<u8> {
    let mut out = Vec::with_capacity(192);
    if set.key().len() == 1 {
        put_u32(&mut out, KEY_BYTE_ORDER, BIG_ENDIAN);
        return out;
    }
    put_u32(&mut out, KEY_BYTE_ORDER, MIXED);
    match set.data() {
        Data::None => {}
        Data::Fields([_]) => put_u32(&mut out, DATA_BYTE_ORDER, HOST),
        Data::Fields(_) | Data::Verdict => put_u32(&mut out, DATA_BYTE_ORDER, MIXED),
    }
    if let Data::Fields(fields) = set.data() {
        put(&mut out, KEY_TYPEOF, &concatenation(set.key(), family));
        let data = match fields {
            [field] => expression(*field, family),
            fields => concatenation(fields, family),
        };
        put(&mut out, DATA_TYPEOF, &data);
    } else {
        // The type is in the declaration; nft writes an empty concatenation.
        put(&mut out, KEY_TYPEOF, &concatenation(&[], family));
    }
    if set.is_map() {
        put_u32(&mut out, DATA_INTERVAL, 0);
    }
    out
}

fn concatenation(fields: &[Field], family: Family) -> Vec<u8> {
    let mut parts = Vec::new();
    for (position, field) in (0_u8..).zip(fields) {
        put(&mut parts, position, &expression(*field, family));
    }
    record(CONCAT, &parts)
}

fn expression(field: Field, family: Family) -> Vec<u8> {
    // nft's numbers of a header, and of the field in it.
    let (header, saddr, daddr) = match family {
        Family::V4 => (12, 11, 12),
        Family::V6 => (13, 8, 9),
    };
    match field {
        Field::Saddr => record(PAYLOAD, &numbers(&[header, saddr])),
        Field::Daddr => record(PAYLOAD, &numbers(&[header, daddr])),
        Field::Dport => record(PAYLOAD, &numbers(&[11, 2])),
        Field::L4Proto => record(META, &numbers(&[16])),
        Field::Serial => record(META, &numbers(&[2])),
        // random, modulus (any will do), offset
        Field::Index => record(NUMGEN, &numbers(&[1, 2, 0])),
    }
}

fn record(kind: u32, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put_u32(&mut out, KIND, kind);
    put(&mut out, BODY, body);
    out
}

fn numbers(values: &[u32]) -> Vec<u8> {
    let mut out = Vec::new();
    for (position, value) in (0_u8..).zip(values) {
        put_u32(&mut out, position, *value);
    }
    out
}

fn put_u32(out: &mut Vec<u8>, kind: u8, value: u32) {
    put(out, kind, &value.to_ne_bytes());
}

/// Every value here is far below the 255 bytes that fit.
fn put(out: &mut Vec<u8>, kind: u8, value: &[u8]) {
    out.push(kind);
    out.push(u8::try_from(value.len()).unwrap_or(u8::MAX));
    out.extend_from_slice(value);
}
