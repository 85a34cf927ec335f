//! One stream through random sends, ends and moves over many lanes, delivered in random pieces.

use super::tests::{BOUNDS, Pair, TOKEN};
use super::{Event, Received};
use crate::tunnel::ResetCode;
use proptest::prelude::*;
use std::collections::VecDeque;

#[derive(Clone, Debug)]
enum Step {
    Send {
        end: usize,
        length: usize,
    },
    Finish {
        end: usize,
    },
    Reset {
        end: usize,
    },
    Stop {
        end: usize,
    },
    Recv {
        end: usize,
    },
    Write {
        lane: usize,
        end: usize,
        limit: usize,
    },
    Deliver {
        lane: usize,
        end: usize,
        count: usize,
    },
    /// The client asks for another lane, unless it waits for an answer already.
    Move {
        is_alone: bool,
        is_refused: bool,
    },
}

/// Lanes that a stream passes at most, and how far it may be ahead of a reader.
const LANES: usize = 8;
const MAX_AHEAD: usize = 4;

fn step(with_resets: bool) -> impl Strategy<Value = Step> {
    let end = 0..2_usize;
    let ends = if with_resets { 1 } else { 0 };
    prop_oneof![
        8 => (end.clone(), 1..40_usize).prop_map(|(end, length)| Step::Send { end, length }),
        1 => end.clone().prop_map(|end| Step::Finish { end }),
        ends => end.clone().prop_map(|end| Step::Reset { end }),
        ends => end.clone().prop_map(|end| Step::Stop { end }),
        10 => end.clone().prop_map(|end| Step::Recv { end }),
        12 => (0..LANES, end.clone(), 1..200_usize).prop_map(|(lane, end, limit)| Step::Write { lane, end, limit }),
        24 => (0..LANES, end, 1..60_usize).prop_map(|(lane, end, count)| Step::Deliver { lane, end, count }),
        4 => (any::<bool>(), 0..4_u8).prop_map(|(is_alone, dice)| Step::Move { is_alone, is_refused: dice == 0 }),
    ]
}

/// A lane and the stream's number on it.
type Place = (usize, u32);

/// One end of the stream, as the halves of a stream would know it.
#[derive(Default)]
struct End {
    sent: u64,
    received: u64,
    is_finished: bool,
    is_reset: bool,
    is_stopped: bool,
    saw: Option<Received>,
    /// Where it sends.
    current: Place,
    reading: Place,
    /// Where it reads on, in order.
    ahead: VecDeque<Place>,
}

struct Simulation {
    lanes: Vec<Pair>,
    ends: [End; 2],
    /// The move that waits for its answer.
    moving: Option<Place>,
    is_refused: bool,
    moves: usize,
}

impl Simulation {
    fn new() -> Self {
        let (base, id) = Pair::opened(BOUNDS);
        let end = || End { current: (0, id), reading: (0, id), ..End::default() };
        Self { lanes: vec![base], ends: [end(), end()], moving: None, is_refused: false, moves: 0 }
    }

    /// What `Route::may_move` says.
    fn may_move(&mut self, end: usize, is_alone: bool) -> bool {
        let (lanes, this) = (&mut self.lanes, &mut self.ends[end]);
        let current = this.current;
        this.ahead.retain(|&(lane, id)| {
            let machine = &mut lanes[lane].ends[end];
            let is_needed = (lane, id) == current || !machine.is_read_out(id);
            if !is_needed {
                machine.release_recv(id);
            }
            is_needed
        });
        this.ahead.len() < if is_alone { 1 } else { MAX_AHEAD }
    }

    fn attach(&mut self, end: usize, next: Place) {
        let (lane, id) = std::mem::replace(&mut self.ends[end].current, next);
        let old = &mut self.lanes[lane].ends[end];
        let remainder = old.move_away(id);
        old.supersede(id);
        old.release_send(id);
        let machine = &mut self.lanes[next.0].ends[end];
        let (unsent, is_finished) =
            remainder.map_or((VecDeque::new(), true), |remainder| (remainder.unsent, remainder.is_finished));
        for bytes in unsent {
            machine.send(next.1, bytes);
        }
        if is_finished {
            let _ = machine.finish(next.1);
        }
        if self.ends[end].is_stopped {
            machine.stop(next.1, ResetCode(2));
        } else {
            self.ends[end].ahead.push_back(next);
        }
    }

    fn ask(&mut self, is_alone: bool, is_refused: bool) {
        if self.moving.is_some() || self.lanes.len() >= LANES || !self.may_move(0, is_alone) {
            return;
        }
        let origin = self.ends[0].current.1;
        let mut pair = Pair::new(BOUNDS);
        let client = &mut pair.ends[0];
        let id = if is_alone { client.attach(TOKEN, origin) } else { client.join(TOKEN, origin) };
        self.moving = Some((self.lanes.len(), id.unwrap()));
        self.is_refused = is_refused;
        self.lanes.push(pair);
    }

    /// What the driver does after every input.
    fn handle_events(&mut self) {
        let Some((lane, _)) = self.moving else { return };
        for event in self.lanes[lane].events(1) {
            if let Event::Attaching { id, token, origin, is_alone } = event {
                assert_eq!((token, origin), (TOKEN, self.ends[1].current.1));
                if self.is_refused || !self.may_move(1, is_alone) {
                    self.lanes[lane].ends[1].refuse(id, 1);
                } else {
                    self.lanes[lane].ends[1].accept(id);
                    self.attach(1, (lane, id));
                }
            }
        }
        for event in self.lanes[lane].events(0) {
            if let Event::Answered { id } = event {
                self.moving = None;
                if self.lanes[lane].ends[0].answer(id) == Some(Ok(())) {
                    self.attach(0, (lane, id));
                    self.moves += 1;
                } else {
                    self.lanes[lane].ends[0].abandon(id, ResetCode::CANCELLED);
                }
            }
        }
    }

    fn run(&mut self, step: &Step) {
        match *step {
            Step::Send { end, length } => {
                let (lane, id) = self.ends[end].current;
                if self.ends[end].is_finished || self.ends[end].is_reset {
                    return;
                }
                let machine = &mut self.lanes[lane].ends[end];
                if machine.has_room(id) == Ok(true) {
                    let sent = self.ends[end].sent;
                    machine.send(id, (sent..sent + length as u64).map(|at| (at % 251) as u8).collect());
                    self.ends[end].sent += length as u64;
                }
            }
            Step::Finish { end } => {
                let (lane, id) = self.ends[end].current;
                let is_finished = self.lanes[lane].ends[end].finish(id).is_ok();
                self.ends[end].is_finished |= is_finished;
            }
            Step::Reset { end } => {
                let (lane, id) = self.ends[end].current;
                if !self.ends[end].is_finished {
                    self.lanes[lane].ends[end].reset(id, ResetCode(1));
                    self.ends[end].is_reset = true;
                }
            }
            Step::Stop { end } => {
                let this = &mut self.ends[end];
                this.is_stopped = true;
                for (lane, id) in std::iter::once(&this.reading).chain(&this.ahead) {
                    self.lanes[*lane].ends[end].stop(*id, ResetCode(2));
                }
            }
            Step::Recv { end } => self.recv(end),
            Step::Write { lane, end, limit } => {
                let lane = lane % self.lanes.len();
                self.lanes[lane].write(end, limit);
            }
            Step::Deliver { lane, end, count } => {
                let lane = lane % self.lanes.len();
                self.lanes[lane].deliver(end, count);
                self.handle_events();
            }
            Step::Move { is_alone, is_refused } => self.ask(is_alone, is_refused),
        }
    }

    fn recv(&mut self, end: usize) {
        let this = &mut self.ends[end];
        if this.is_stopped || this.saw.is_some() {
            return;
        }
        let (lane, id) = this.reading;
        match self.lanes[lane].ends[end].recv(id) {
            Received::Bytes(bytes) => {
                for byte in bytes {
                    assert_eq!(byte, (this.received % 251) as u8, "byte {} of end {end}", this.received);
                    this.received += 1;
                }
            }
            Received::Pending => {}
            Received::Moved => {
                if let Some(next) = this.ahead.pop_front() {
                    this.reading = next;
                    self.lanes[next.0].ends[end].admit(next.1);
                    self.lanes[lane].ends[end].release_recv(id);
                } else {
                    // Only the client may see the peer's MOVE before it knows the lane.
                    assert!(end == 0 && self.moving.is_some(), "end {end} does not know where to read on");
                }
            }
            ended => this.saw = Some(ended),
        }
    }

    /// Lets everything flow to its end. Says whether both ends are done in a bounded number of turns.
    fn settle(&mut self) {
        for end in 0..2 {
            self.run(&Step::Finish { end });
        }
        for _ in 0..600 {
            for lane in 0..self.lanes.len() {
                for end in 0..2 {
                    self.run(&Step::Write { lane, end, limit: 1 << 20 });
                    self.run(&Step::Deliver { lane, end, count: usize::MAX });
                }
            }
            self.recv(0);
            self.recv(1);
        }
    }

    fn check(&mut self) {
        for end in 0..2 {
            let (this, peer) = (&self.ends[end], &self.ends[1 - end]);
            if this.is_stopped {
                continue;
            }
            match &this.saw {
                Some(Received::Finished) => assert_eq!(this.received, peer.sent, "end {end} lost bytes"),
                Some(Received::Reset(_)) => assert!(peer.is_reset, "end {end} saw a reset that nobody sent"),
                other => panic!("end {end} waits for ever: {other:?} after {} of {}", this.received, peer.sent),
            }
        }
        for end in 0..2 {
            let this = &self.ends[end];
            for (lane, id) in std::iter::once(&this.reading).chain(&this.ahead).chain([&this.current]) {
                let machine = &mut self.lanes[*lane].ends[end];
                machine.release_send(*id);
                machine.stop(*id, ResetCode::CANCELLED);
            }
        }
        self.lanes.iter_mut().for_each(Pair::exchange);
        for lane in &self.lanes {
            assert!(lane.ends.iter().all(|machine| machine.streams() == 0), "a stream is left behind");
        }
    }
}

/// Lanes are shared, so it is credit alone that holds the sender back.
#[test]
fn a_sleeping_reader_has_one_window_unread_however_often_the_stream_moves() {
    let mut simulation = Simulation::new();
    let flow = |simulation: &mut Simulation| {
        for _ in 0..20 {
            simulation.run(&Step::Send { end: 0, length: 10 });
            for lane in 0..simulation.lanes.len() {
                simulation.run(&Step::Write { lane, end: 0, limit: 1 << 20 });
                simulation.run(&Step::Deliver { lane, end: 0, count: usize::MAX });
                simulation.run(&Step::Write { lane, end: 1, limit: 1 << 20 });
                simulation.run(&Step::Deliver { lane, end: 1, count: usize::MAX });
                // The server's reader sleeps; the client's does not.
                simulation.recv(0);
            }
        }
    };
    flow(&mut simulation);
    while simulation.lanes.len() < LANES {
        let lanes = simulation.lanes.len();
        simulation.ask(false, false);
        flow(&mut simulation);
        assert_eq!(simulation.lanes.len(), lanes + 1, "the stream cannot move any more");
    }
    assert_eq!(simulation.moves, LANES - 1);
    let bound = u64::from(BOUNDS.window) + BOUNDS.send_buffer as u64 + 10;
    assert!(simulation.ends[0].sent < bound, "{} bytes were taken", simulation.ends[0].sent);
    // All but the first, which has the unread bytes, the one before the present one, and that.
    assert!(simulation.ends[1].ahead.len() <= 2, "{} lanes are held", simulation.ends[1].ahead.len());
    simulation.settle();
    simulation.check();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn bytes_stay_in_order_and_complete_through_any_move(steps in proptest::collection::vec(step(false), 0..300)) {
        let mut simulation = Simulation::new();
        steps.iter().for_each(|step| simulation.run(step));
        simulation.settle();
        simulation.check();
    }

    #[test]
    fn resets_and_stops_end_directions_and_leave_nothing_behind(
        steps in proptest::collection::vec(step(true), 0..300),
    ) {
        let mut simulation = Simulation::new();
        steps.iter().for_each(|step| simulation.run(step));
        simulation.settle();
        simulation.check();
    }
}
