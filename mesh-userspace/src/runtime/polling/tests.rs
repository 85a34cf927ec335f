use super::allowance::BURST;
use super::conversation::LATE;
use super::*;

const SOON: Duration = Duration::from_micros(100);

fn is_due(now: Instant) -> bool {
    AWAITED.with(|awaited| awaited.is_due(now))
}

/// A conversation in which the tunnel has answered three times, each after `waited`, and is asked again `now`.
fn asked_again(waited: Duration, now: Instant) -> Conversation {
    let mut conversation = Conversation::default();
    for round in (1..=3).rev() {
        let asked = now - round * Duration::from_secs(1);
        conversation.passed_at(Direction::ToTunnel, asked);
        conversation.passed_at(Direction::FromTunnel, asked + waited);
    }
    conversation.passed_at(Direction::ToTunnel, now);
    conversation
}

#[test]
fn an_answer_that_usually_comes_soon_is_due_until_it_comes_or_is_late() {
    let now = Instant::now();
    assert!(!is_due(now));
    let mut conversation = asked_again(SOON, now);
    assert!(is_due(now + SOON));
    assert!(!is_due(now + 3 * SOON), "for twice as long as usual at most");
    conversation.passed_at(Direction::FromTunnel, now + SOON);
    // The application usually takes a second.
    assert!(!is_due(now + SOON));
    conversation.passed_at(Direction::ToTunnel, now + 2 * SOON);
    assert!(is_due(now + 2 * SOON));
    drop(conversation);
    assert!(!is_due(now + 2 * SOON), "nobody waits for it any more");
}

#[test]
fn an_answer_that_usually_takes_long_is_not_due_until_it_comes_sooner() {
    let now = Instant::now();
    let mut conversation = asked_again(Duration::from_secs(10).min(LATE), now);
    assert!(!is_due(now));
    let mut at = now;
    let mut rounds = 0;
    while !is_due(at) {
        conversation.passed_at(Direction::FromTunnel, at + SOON);
        at += Duration::from_secs(1);
        conversation.passed_at(Direction::ToTunnel, at);
        rounds += 1;
        assert!(rounds < 20, "{:?}", conversation.usual);
    }
}

#[test]
fn one_thread_polls_at_a_time_and_no_more_than_the_share() {
    let start = Instant::now();
    let allowance = Allowance::new(0.25, start).unwrap();
    let polled = |at: Instant, time: Duration| {
        let Some(mut polling) = allowance.enter(at) else { return false };
        assert!(allowance.enter(at).is_none(), "somebody polls");
        polling.until = at + time;
        true
    };
    let (step, mut at) = (Duration::from_micros(100), start);
    let mut total = Duration::ZERO;
    while at < start + Duration::from_secs(1) {
        if polled(at, step) {
            total += step;
        }
        at += step;
    }
    assert!(total >= Duration::from_millis(250) && total <= Duration::from_millis(250) + 2 * BURST, "{total:?}");
    assert_eq!(allowance.polled(), Polled { time: total, pauses: 0 });
    assert!(Allowance::new(0.0, start).is_none());
}

/// What is polled while a peer on another thread is asked so often and answers each time after so long.
fn polled_for(waited: Duration, rounds: u32) -> Polled {
    let allowance = Allowance::new(1.0, Instant::now()).unwrap();
    let (ask, asked) = std::sync::mpsc::channel::<()>();
    let (answer, mut answers) = tokio::sync::mpsc::unbounded_channel();
    let peer = std::thread::spawn(move || {
        while asked.recv().is_ok() {
            let now = Instant::now();
            while now.elapsed() < waited {
                std::thread::yield_now();
            }
            // Nobody waits for the last one if the test has failed.
            let _ = answer.send(());
        }
    });
    let talk = async {
        let mut conversation = Conversation::default();
        for _ in 0..rounds {
            ask.send(()).unwrap();
            conversation.passed(Direction::ToTunnel);
            answers.recv().await.unwrap();
            conversation.passed(Direction::FromTunnel);
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        tokio::select! {
            biased;
            () = talk => {}
            () = poll(Arc::clone(&allowance)) => {}
        }
    });
    drop(ask);
    peer.join().unwrap();
    allowance.polled()
}

#[test]
fn a_thread_waits_awake_for_what_comes_soon_and_sleeps_for_the_rest() {
    assert!(polled_for(Duration::from_micros(20), 2_000).time > Duration::ZERO);
    assert_eq!(polled_for(2 * LATE, 50), Polled::default());
}
