//! One stream through random sends, ends and moves over two lanes, delivered in random pieces.

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
    /// The client asks for the exclusive lane, at most once.
    Attach,
}

fn step(with_resets: bool) -> impl Strategy<Value = Step> {
    let end = 0..2_usize;
    let ends = if with_resets { 1 } else { 0 };
    prop_oneof![
        8 => (end.clone(), 1..40_usize).prop_map(|(end, length)| Step::Send { end, length }),
        1 => end.clone().prop_map(|end| Step::Finish { end }),
        ends => end.clone().prop_map(|end| Step::Reset { end }),
        ends => end.clone().prop_map(|end| Step::Stop { end }),
        8 => end.clone().prop_map(|end| Step::Recv { end }),
        8 => (0..2_usize, end.clone(), 1..200_usize).prop_map(|(lane, end, limit)| Step::Write { lane, end, limit }),
        12 => (0..2_usize, end, 1..60_usize).prop_map(|(lane, end, count)| Step::Deliver { lane, end, count }),
        2 => Just(Step::Attach),
    ]
}

/// One end of the stream: which lane each direction is on, as the halves of a stream would know.
#[derive(Default)]
struct End {
    sent: u64,
    received: u64,
    is_finished: bool,
    is_reset: bool,
    is_stopped: bool,
    saw: Option<Received>,
    /// The stream's number on the exclusive lane, once known here.
    own: Option<u32>,
    reads_own: bool,
}

struct Simulation {
    lanes: [Pair; 2],
    id: u32,
    attaching: Option<u32>,
    ends: [End; 2],
}

impl Simulation {
    fn new() -> Self {
        let (base, id) = Pair::opened(BOUNDS);
        Self { lanes: [base, Pair::new(BOUNDS)], id, attaching: None, ends: [End::default(), End::default()] }
    }

    /// Lane and number where this end sends now.
    fn sending(&self, end: usize) -> (usize, u32) {
        self.ends[end].own.map_or((0, self.id), |own| (1, own))
    }

    fn attach_here(&mut self, end: usize, own: u32) {
        let remainder = self.lanes[0].ends[end].move_away(self.id);
        let machine = &mut self.lanes[1].ends[end];
        let (unsent, is_finished) =
            remainder.map_or((VecDeque::new(), true), |remainder| (remainder.unsent, remainder.is_finished));
        for bytes in unsent {
            machine.send(own, bytes);
        }
        if is_finished {
            let _ = machine.finish(own);
        }
        self.ends[end].own = Some(own);
        if self.ends[end].is_stopped {
            self.lanes[1].ends[end].stop(own, ResetCode(2));
        }
    }

    /// What the driver does after every input.
    fn handle_events(&mut self) {
        for event in self.lanes[1].events(1) {
            if let Event::Attaching { id, token, origin } = event {
                assert_eq!((token, origin), (TOKEN, self.id));
                self.lanes[1].ends[1].accept(id);
                self.attach_here(1, id);
            }
        }
        for event in self.lanes[1].events(0) {
            if let Event::Answered { id } = event {
                assert_eq!(self.lanes[1].ends[0].answer(id), Some(Ok(())));
                self.attach_here(0, id);
            }
        }
    }

    fn run(&mut self, step: &Step) {
        match *step {
            Step::Send { end, length } => {
                let (lane, id) = self.sending(end);
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
                let (lane, id) = self.sending(end);
                let is_finished = self.lanes[lane].ends[end].finish(id).is_ok();
                self.ends[end].is_finished |= is_finished;
            }
            Step::Reset { end } => {
                let (lane, id) = self.sending(end);
                if !self.ends[end].is_finished {
                    self.lanes[lane].ends[end].reset(id, ResetCode(1));
                    self.ends[end].is_reset = true;
                }
            }
            Step::Stop { end } => {
                self.ends[end].is_stopped = true;
                self.lanes[0].ends[end].stop(self.id, ResetCode(2));
                if let Some(own) = self.ends[end].own {
                    self.lanes[1].ends[end].stop(own, ResetCode(2));
                }
            }
            Step::Recv { end } => self.recv(end),
            Step::Write { lane, end, limit } => self.lanes[lane].write(end, limit),
            Step::Deliver { lane, end, count } => {
                self.lanes[lane].deliver(end, count);
                self.handle_events();
            }
            Step::Attach => {
                if self.attaching.is_none() {
                    self.attaching = Some(self.lanes[1].ends[0].attach(TOKEN, self.id).unwrap());
                }
            }
        }
    }

    fn recv(&mut self, end: usize) {
        let this = &mut self.ends[end];
        if this.is_stopped || this.saw.is_some() {
            return;
        }
        let (lane, id) = if this.reads_own { (1, this.own.unwrap()) } else { (0, self.id) };
        match self.lanes[lane].ends[end].recv(id) {
            Received::Bytes(bytes) => {
                for byte in bytes {
                    assert_eq!(byte, (this.received % 251) as u8, "byte {} of end {end}", this.received);
                    this.received += 1;
                }
            }
            Received::Pending => {}
            // The client may see the server's MOVE before it knows the lane.
            Received::Moved => this.reads_own = this.own.is_some(),
            ended => this.saw = Some(ended),
        }
    }

    /// Lets everything flow to its end. Says whether both ends are done in a bounded number of turns.
    fn settle(&mut self) {
        for end in 0..2 {
            self.run(&Step::Finish { end });
        }
        for _ in 0..2000 {
            for lane in 0..2 {
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
            self.lanes[0].ends[end].release_send(self.id);
            self.lanes[0].ends[end].stop(self.id, ResetCode::CANCELLED);
            if let Some(own) = self.ends[end].own {
                self.lanes[1].ends[end].release_send(own);
                self.lanes[1].ends[end].stop(own, ResetCode::CANCELLED);
            }
        }
        self.lanes.iter_mut().for_each(Pair::exchange);
        for lane in &self.lanes {
            assert!(lane.ends.iter().all(|machine| machine.streams() == 0), "a stream is left behind");
        }
    }
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
