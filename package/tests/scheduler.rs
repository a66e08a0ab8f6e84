//! The queue against slow, obvious counts, on random arrivals and cancellations.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use proptest::prelude::*;
use radix_mlp::{Batch, Budget, Next, Scheduler, Ticket, Tokens};

const WINDOW: Duration = Duration::from_millis(5);

fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// What is in the batch that must be due.
fn run(scheduler: &mut Scheduler, now: Duration) -> Batch {
    match scheduler.next(now) {
        Next::Run(batch) => batch,
        other => panic!("expected a batch, got {other:?}"),
    }
}

fn tickets(batch: &Batch) -> HashSet<Ticket> {
    let sequences = batch.sequences.iter();
    sequences.flat_map(|s| s.tickets.iter().copied()).collect()
}

/// Nodes of the trie, counted as different prefixes.
fn prefixes<'a>(sequences: impl IntoIterator<Item = &'a Tokens>) -> usize {
    let sequences = sequences.into_iter();
    let all: HashSet<&[u32]> = sequences
        .flat_map(|s| (1..=s.len()).map(|n| &s[..n]))
        .collect();
    all.len()
}

#[test]
fn an_empty_queue_is_idle() {
    let mut scheduler = Scheduler::new(Budget::UniqueTokens(8), WINDOW);
    assert_eq!(scheduler.next(ms(0)), Next::Idle);
    let ticket = scheduler.push([1].into(), ms(0));
    assert!(scheduler.cancel(ticket));
    assert!(!scheduler.cancel(ticket));
    assert_eq!(scheduler.next(ms(100)), Next::Idle);
    assert!(scheduler.is_empty());
}

#[test]
fn what_leaves_no_room_is_a_batch_before_its_window_has_passed() {
    let mut scheduler = Scheduler::new(Budget::UniqueTokens(8), WINDOW);
    assert_eq!(scheduler.next_full(), None);
    scheduler.push([1, 2, 3, 4].into(), ms(0));
    scheduler.push([1, 2, 3, 5, 6].into(), ms(0));
    assert_eq!(scheduler.next_full(), None);
    assert_eq!(scheduler.next(ms(0)), Next::WaitUntil(WINDOW));
    scheduler.push([1, 2, 7, 8].into(), ms(0));
    let batch = scheduler.next_full().expect("8 unique tokens wait");
    assert_eq!((batch.tokens, batch.unique_tokens), (13, 8));
    assert_eq!(scheduler.next_full(), None);
    assert!(scheduler.is_empty());
}

#[test]
fn requests_of_one_query_that_arrive_within_the_window_are_one_batch() {
    let mut scheduler = Scheduler::new(Budget::UniqueTokens(100), WINDOW);
    for passage in 0..5 {
        scheduler.push([1, 2, 3, 10 + passage].into(), ms(u64::from(passage)));
        assert_eq!(
            scheduler.next(ms(u64::from(passage))),
            Next::WaitUntil(WINDOW)
        );
    }
    let batch = run(&mut scheduler, WINDOW);
    assert_eq!((batch.tokens, batch.unique_tokens), (20, 8));
    assert_eq!(scheduler.next(WINDOW), Next::Idle);
}

#[test]
fn a_full_batch_does_not_wait() {
    let mut scheduler = Scheduler::new(Budget::UniqueTokens(6), WINDOW);
    scheduler.push([1, 2, 3].into(), ms(0));
    // Shares two tokens, so that four are waiting in all.
    scheduler.push([1, 2, 4].into(), ms(0));
    assert_eq!(scheduler.next(ms(0)), Next::WaitUntil(WINDOW));
    scheduler.push([5, 6].into(), ms(0));
    assert_eq!(tickets(&run(&mut scheduler, ms(0))).len(), 3);
}

#[test]
fn the_same_tokens_are_computed_once() {
    let mut scheduler = Scheduler::new(Budget::Tokens(4), WINDOW);
    let first = scheduler.push([1, 2].into(), ms(0));
    let cancelled = scheduler.push([1, 2].into(), ms(0));
    let second = scheduler.push([1, 2].into(), ms(1));
    assert!(scheduler.cancel(cancelled));
    let batch = run(&mut scheduler, WINDOW);
    assert_eq!(batch.sequences.len(), 1);
    assert_eq!(batch.sequences[0].tickets, [first, second]);
    assert_eq!((batch.tokens, batch.unique_tokens), (4, 2));
}

#[test]
fn an_oversized_sequence_is_a_batch_of_its_own() {
    let mut scheduler = Scheduler::new(Budget::UniqueTokens(3), WINDOW);
    let long = scheduler.push([1, 2, 3, 4, 5].into(), ms(0));
    scheduler.push([7].into(), ms(0));
    assert_eq!(tickets(&run(&mut scheduler, ms(0))), [long].into());
}

#[test]
fn what_shares_goes_ahead_within_half_of_the_batch() {
    let mut scheduler = Scheduler::new(Budget::UniqueTokens(20), WINDOW);
    let seed = scheduler.push((0..8).collect(), ms(0));
    let unrelated = scheduler.push((100..108).collect(), ms(0));
    // Each adds three tokens to the seed's five: three of them fit in half a batch.
    let alike: Vec<Ticket> = (0..5)
        .map(|n| scheduler.push([0, 1, 2, 3, 4, 20 + n, 1, 1].into(), ms(1)))
        .collect();
    let batch = run(&mut scheduler, ms(1));
    let first: HashSet<Ticket> = [seed].into_iter().chain(alike[..3].to_vec()).collect();
    assert_eq!(tickets(&batch), first);
    let batch = run(&mut scheduler, WINDOW);
    assert!(tickets(&batch).contains(&unrelated));
}

#[test]
fn a_few_shared_tokens_are_no_reason_to_go_ahead() {
    let mut scheduler = Scheduler::new(Budget::UniqueTokens(10), WINDOW);
    let [seed, unrelated] = [[0, 1, 2, 3, 4], [10, 11, 12, 13, 14]];
    let first = scheduler.push(seed.into(), ms(0));
    let second = scheduler.push(unrelated.into(), ms(0));
    scheduler.push([0, 30, 31, 32, 33].into(), ms(0));
    assert_eq!(tickets(&run(&mut scheduler, ms(0))), [first, second].into());
}

#[test]
fn tokens_are_bounded_whatever_they_share() {
    let mut scheduler = Scheduler::new(Budget::UniqueTokens(100), WINDOW).with_max_tokens(250);
    // 90 tokens for all, and one for each: ten would be a batch by their unique tokens.
    let sequence = |last: u32| (0..90).chain([1000 + last]).collect::<Tokens>();
    for last in 0..2 {
        scheduler.push(sequence(last), ms(0));
    }
    assert_eq!(scheduler.next(ms(0)), Next::WaitUntil(WINDOW));
    for last in 2..10 {
        scheduler.push(sequence(last), ms(0));
    }
    for _ in 0..5 {
        let batch = run(&mut scheduler, WINDOW);
        assert_eq!((batch.tokens, batch.unique_tokens), (182, 92));
    }
    assert_eq!(scheduler.next(WINDOW), Next::Idle);
}

/// One thing that happens to a queue.
#[derive(Clone, Debug)]
enum Event {
    Push(Vec<u32>),
    /// Cancels one of those pushed so far.
    Cancel(prop::sample::Index),
    Batch,
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let sequence = prop::collection::vec(0..3u32, 0..12);
    let event = prop_oneof![
        6 => sequence.prop_map(Event::Push),
        1 => any::<prop::sample::Index>().prop_map(Event::Cancel),
        1 => Just(Event::Batch),
    ];
    prop::collection::vec(event, 0..80)
}

fn budget() -> impl Strategy<Value = Budget> {
    prop_oneof![
        (1..40usize).prop_map(Budget::UniqueTokens),
        (1..40usize).prop_map(Budget::Tokens),
    ]
}

fn limit(budget: Budget) -> usize {
    match budget {
        Budget::UniqueTokens(limit) | Budget::Tokens(limit) => limit,
    }
}

fn check(batch: &Batch, budget: Budget, max_tokens: usize, waiting: &BTreeMap<Ticket, Tokens>) {
    let sequences: Vec<&Tokens> = batch.sequences.iter().map(|s| &s.tokens).collect();
    assert!(sequences.is_sorted_by(|a, b| a < b));
    for sequence in &batch.sequences {
        assert!(!sequence.tickets.is_empty());
        for ticket in &sequence.tickets {
            assert_eq!(waiting[ticket], sequence.tokens);
        }
    }
    let unique = prefixes(sequences.iter().copied());
    assert_eq!(batch.unique_tokens, unique);
    let tokens = |s: &radix_mlp::Scheduled| s.tokens.len() * s.tickets.len();
    assert_eq!(
        batch.tokens,
        batch.sequences.iter().map(tokens).sum::<usize>()
    );
    let shared: usize = batch.sequences.iter().map(|s| s.shared).sum();
    let different: usize = sequences.iter().map(|s| s.len()).sum();
    assert_eq!(different - shared, unique);
    let spent = match budget {
        Budget::UniqueTokens(_) => unique,
        Budget::Tokens(_) => different,
    };
    assert!(sequences.len() == 1 || spent <= limit(budget) && different <= max_tokens);
    let oldest = waiting.keys().next().unwrap();
    assert!(tickets(batch).contains(oldest));
}

/// A ticket that waits, and in how many batches at most it has to be computed.
struct Waits {
    batches: usize,
    tokens: Tokens,
}

proptest! {
    /// Every ticket that is not cancelled is computed once, within the number of batches that the
    /// documentation of [`Scheduler`] gives, in batches that keep to the budget.
    #[test]
    fn everything_is_computed_once_and_in_time(
        events in events(),
        budget in budget(),
        times in 1..4usize,
    ) {
        let max_tokens = times * limit(budget);
        let mut scheduler = Scheduler::new(budget, WINDOW).with_max_tokens(max_tokens);
        let mut waiting: BTreeMap<Ticket, Waits> = BTreeMap::new();
        let mut pushed = Vec::new();
        let drain = std::iter::repeat_n(Event::Batch, events.len());
        for event in events.iter().cloned().chain(drain) {
            match event {
                Event::Push(tokens) => {
                    let before: usize = waiting.values().map(|w| w.tokens.len()).sum();
                    let tokens: Tokens = tokens.into();
                    let ticket = scheduler.push(tokens.clone(), ms(0));
                    let batches = 4 * before / limit(budget) + 2;
                    waiting.insert(ticket, Waits { batches, tokens });
                    pushed.push(ticket);
                }
                Event::Cancel(index) if !pushed.is_empty() => {
                    let ticket = *index.get(&pushed);
                    prop_assert_eq!(scheduler.cancel(ticket), waiting.remove(&ticket).is_some());
                }
                Event::Cancel(_) => {}
                Event::Batch => {
                    let Next::Run(batch) = scheduler.next(WINDOW) else {
                        prop_assert!(waiting.is_empty());
                        continue;
                    };
                    let tokens = waiting.iter().map(|(&t, w)| (t, w.tokens.clone())).collect();
                    check(&batch, budget, max_tokens, &tokens);
                    for ticket in tickets(&batch) {
                        waiting.remove(&ticket);
                    }
                    for waits in waiting.values_mut() {
                        prop_assert!(waits.batches > 1, "passed over too often");
                        waits.batches -= 1;
                    }
                }
            }
            prop_assert_eq!(scheduler.len(), waiting.len());
        }
        prop_assert!(scheduler.is_empty());
    }

    /// Less than a batch waits for its window, a batch or more does not.
    #[test]
    fn only_what_could_grow_waits(
        events in events(),
        budget in budget(),
        times in 1..4usize,
    ) {
        let max_tokens = times * limit(budget);
        let mut scheduler = Scheduler::new(budget, WINDOW).with_max_tokens(max_tokens);
        let mut waiting: BTreeMap<Ticket, Tokens> = BTreeMap::new();
        for event in events {
            match event {
                Event::Push(tokens) => {
                    let tokens: Tokens = tokens.into();
                    waiting.insert(scheduler.push(tokens.clone(), ms(0)), tokens);
                }
                Event::Cancel(index) if !waiting.is_empty() => {
                    let ticket = *waiting.keys().nth(index.index(waiting.len())).unwrap();
                    scheduler.cancel(ticket);
                    waiting.remove(&ticket);
                }
                _ => {}
            }
        }
        let different: HashSet<&Tokens> = waiting.values().collect();
        let tokens: usize = different.iter().map(|s| s.len()).sum();
        let cost = match budget {
            Budget::UniqueTokens(_) => prefixes(different),
            Budget::Tokens(_) => tokens,
        };
        let next = scheduler.next(ms(0));
        if waiting.is_empty() {
            prop_assert_eq!(next, Next::Idle);
        } else if cost < limit(budget) && tokens < max_tokens {
            prop_assert_eq!(next, Next::WaitUntil(WINDOW));
        } else {
            prop_assert!(matches!(next, Next::Run(_)));
        }
    }
}
