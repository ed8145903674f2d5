//! Random histories over a link that cuts, repeats and damages: whatever happens, the client
//! holds a state the server once published, never goes back, and ends at the server's head.

use lockstep_model::Key;
use lockstep_wire::raw;
use proptest::prelude::*;

use super::{Session, Step};
use crate::testing::*;

#[derive(Debug, Clone)]
enum Act {
    Service(u8, u8),
    Endpoints(u8, Vec<u8>),
    Cidr(u8, u8),
    Remove(u8),
    RemoveCidr(u8),
    /// Sends what is new, with this done to it on the way.
    Send(Fate),
    Cut,
    /// A second transaction is sent again.
    Repeat,
}

#[derive(Debug, Clone)]
enum Fate {
    Whole,
    Lost,
    /// The frame never commits.
    Torn,
    /// A byte of the first body is changed.
    Damaged(usize),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        (0..6u8, 0..4u8).prop_map(|(index, variant)| Act::Service(index, variant)),
        (0..6u8, prop::collection::vec(1..9u8, 0..5)).prop_map(|(index, hosts)| Act::Endpoints(index, hosts)),
        (0..3u8, 0..4u8).prop_map(|(index, variant)| Act::Cidr(index, variant)),
        (0..6u8).prop_map(Act::Remove),
        (0..3u8).prop_map(Act::RemoveCidr),
        prop_oneof![
            4 => Just(Fate::Whole),
            1 => Just(Fate::Lost),
            1 => Just(Fate::Torn),
            2 => (0..400usize).prop_map(Fate::Damaged),
        ]
        .prop_map(Act::Send),
        Just(Act::Cut),
        Just(Act::Repeat),
    ]
}

/// The two ends and the link between them.
struct World {
    server: Server,
    session: Session,
    /// Position of the stream; `None` = no connection.
    cursor: Option<u64>,
    highest: u64,
}

impl World {
    fn connect(&mut self) {
        let hello = self.session.connected(at(0));
        let (mode, frames) = self.server.answer(&hello);
        self.cursor = Some(self.server.seq());
        let welcome = self.server.welcome(mode);
        for frame in std::iter::once(welcome).chain(frames) {
            self.deliver(frame);
        }
    }

    fn deliver(&mut self, frame: raw::SyncResponse) {
        let step = self.session.receive(frame, at(0));
        self.follow(step);
        self.check();
    }

    /// Does what a step asks for; a damaged answer is not part of this test.
    fn follow(&mut self, step: Step) {
        if step.end.is_some() {
            self.session.disconnected();
            self.cursor = None;
        } else if let (Some(request), Some(cursor)) = (step.send, self.cursor) {
            for frame in self.server.refetched(&request, cursor) {
                let step = self.session.receive(frame, at(0));
                self.follow(step);
            }
            if self.session.position().is_some_and(|position| position.seq == self.server.seq()) {
                self.cursor = self.cursor.map(|_| self.server.seq());
            }
        }
    }

    fn check(&mut self) {
        let Some(position) = self.session.position() else { return };
        assert!(position.seq >= self.highest, "went back from {} to {}", self.highest, position.seq);
        self.highest = position.seq;
        if self.session.faults() == 0 {
            assert_eq!(position, self.server.position(position.seq));
            assert_eq!(self.session.state().digest(), position.digest);
        }
    }

    fn send(&mut self, fate: &Fate) {
        let Some(cursor) = self.cursor else { return };
        let head = self.server.seq();
        if cursor == head {
            return;
        }
        self.cursor = Some(head);
        for mut frame in self.server.delta(cursor, head, true) {
            match fate {
                Fate::Whole => {}
                Fate::Lost => continue,
                Fate::Torn => update_of(&mut frame).commit = false,
                Fate::Damaged(at) => damage(&mut frame, *at),
            }
            self.deliver(frame);
        }
    }
}

fn damage(frame: &mut raw::SyncResponse, at: usize) {
    let Some(raw::update::Payload::Batch(batch)) = &update_of(frame).payload else { return };
    if batch.upserts.is_empty() {
        return;
    }
    let body = body_of(frame, 0);
    let mut bytes = body.to_vec();
    let at = at % bytes.len();
    bytes[at] ^= 0x15;
    *body = bytes.into();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn every_history_ends_at_the_head(acts in prop::collection::vec(act(), 1..60)) {
        let server = Server::new(7, cluster(3));
        let mut world = World { server, session: session(None), cursor: None, highest: 0 };
        world.connect();
        for act in acts {
            match act {
                Act::Service(index, variant) => world.server.upsert(service(index, variant)),
                Act::Endpoints(index, hosts) => world.server.upsert(endpoints(index, &hosts)),
                Act::Cidr(index, variant) => world.server.upsert(service_cidr(index, variant)),
                Act::Remove(index) => world.server.remove(&Key::Service(service_key(index))),
                Act::RemoveCidr(index) => world.server.remove(&Key::ServiceCidr(cidr_key(index))),
                Act::Send(fate) => world.send(&fate),
                Act::Cut => {
                    world.session.disconnected();
                    world.cursor = None;
                    world.connect();
                }
                Act::Repeat => {
                    let head = world.server.seq();
                    if world.cursor.is_some() && head > 1 {
                        for frame in world.server.delta(head - 2, head - 1, false) {
                            world.deliver(frame);
                        }
                    }
                }
            }
        }
        // A quiet end: one connection without accidents.
        world.session.disconnected();
        world.connect();
        prop_assert_eq!(world.session.state().digest(), world.server.head().digest());
        prop_assert_eq!(world.session.faults(), 0);
        prop_assert_eq!(world.session.position(), Some(world.server.position(world.server.seq())));
    }
}
