//! A queue that fills batches by unique tokens, so that sequences that share prefixes meet.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use crate::batching::Budget;
use crate::prefix::{common_prefix, lexicographic};

/// The tokens of a sequence, shared between the queue and whoever asked for it.
pub type Tokens = Arc<[u32]>;

/// Names one sequence that waits; later ones compare greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// What to do now.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing waits.
    Idle,
    /// Ask again at this time, or when something arrived: a fuller batch may be had until then.
    WaitUntil(Duration),
    /// Compute this.
    Run(Batch),
}

/// Sequences to be computed together, in lexicographic order of their tokens.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// The different sequences.
    pub sequences: Vec<Scheduled>,
    /// Tokens of all tickets, shared or not.
    pub tokens: usize,
    /// Nodes of the sequences' trie, where positions count from 0 in each.
    pub unique_tokens: usize,
}

/// A sequence of a batch.
#[derive(Debug, PartialEq, Eq)]
pub struct Scheduled {
    /// What is computed.
    pub tokens: Tokens,
    /// Who waits for it: several where the same tokens were asked for more than once.
    pub tickets: Vec<Ticket>,
    /// How many of the tokens the sequence before it has too.
    pub shared: usize,
}

/// Sequences that wait to be computed, and the rule by which they become batches.
///
/// A batch starts with the sequence that has waited longest and takes those along that share most
/// with it: neighbours in the lexicographic order of tokens, which is the depth-first order of the
/// prefix trie of all that wait. Then comes the next in order of arrival, until one does not fit.
/// The same tokens asked for twice are one sequence.
///
/// Sequences that go ahead of older ones take at most half of a batch, and only if the batch has at
/// least a quarter of their tokens already. Any two consecutive batches therefore spend more than
/// half a budget on the oldest sequences, or empty the queue: a sequence that finds others of W
/// tokens waiting is computed in one of the next 4 W / budget + 2 batches, whoever arrives later.
///
/// What a batch takes beside its computation grows with its tokens, shared or not: with
/// [`Self::with_max_tokens`] they are bounded too, and those that go ahead take half of them at most.
///
/// Nothing here reads a clock or waits: times are durations since any fixed moment.
///
/// ```
/// use std::time::Duration;
/// use radix_mlp::{Budget, Next, Scheduler};
///
/// let mut scheduler = Scheduler::new(Budget::UniqueTokens(4), Duration::from_millis(2));
/// let first = scheduler.push([1, 2, 3].into(), Duration::ZERO);
/// let other = scheduler.push([9, 9].into(), Duration::ZERO);
/// let alike = scheduler.push([1, 2, 4].into(), Duration::ZERO);
///
/// // The queue holds more than a batch takes, so that there is nothing to wait for.
/// let Next::Run(batch) = scheduler.next(Duration::ZERO) else { panic!() };
/// assert_eq!(batch.sequences[0].tickets, [first]);
/// assert_eq!(batch.sequences[1].tickets, [alike]);
/// assert_eq!((batch.tokens, batch.unique_tokens), (6, 4));
///
/// // What is left may find company until its window has passed.
/// let window = Duration::from_millis(2);
/// assert_eq!(scheduler.next(Duration::ZERO), Next::WaitUntil(window));
/// let Next::Run(batch) = scheduler.next(window) else { panic!() };
/// assert_eq!(batch.sequences[0].tickets, [other]);
/// ```
#[derive(Debug)]
pub struct Scheduler {
    budget: Budget,
    window: Duration,
    /// Most tokens in a batch, shared or not; at least the budget's limit.
    max_tokens: usize,
    /// The prefix index: neighbours share most.
    by_tokens: BTreeMap<Key, Vec<Ticket>>,
    by_arrival: BTreeMap<Ticket, Arrival>,
    tickets: u64,
    /// What the waiting sequences would be as one batch.
    waiting: Load,
}

/// What a batch takes, each of its different sequences counted once.
#[derive(Clone, Copy, Debug, Default)]
struct Load {
    /// What its budget counts.
    cost: usize,
    /// Tokens, shared or not.
    tokens: usize,
}

#[derive(Debug)]
struct Arrival {
    tokens: Key,
    at: Duration,
}

/// A sequence in its place among others. Those that share long prefixes are compared often.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Key(Tokens);

impl Ord for Key {
    fn cmp(&self, other: &Self) -> Ordering {
        lexicographic(&self.0, &other.0)
    }
}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// One in so many of a sequence's tokens must be in a batch already for it to go ahead of older ones.
const SHARED_TO_GO_AHEAD: usize = 4;
/// One in so many of a batch's tokens may be spent on those that do.
const AHEAD: usize = 2;

impl Scheduler {
    /// A queue for batches within `budget`; a sequence that exceeds it is a batch of its own. Where
    /// less than a batch waits, the oldest sequence is kept for `window` at most.
    pub fn new(budget: Budget, window: Duration) -> Self {
        Self {
            budget,
            window,
            max_tokens: usize::MAX,
            by_tokens: BTreeMap::new(),
            by_arrival: BTreeMap::new(),
            tickets: 0,
            waiting: Load::default(),
        }
    }

    /// Bounds the tokens of a batch, shared or not, of which the same sequence asked for twice counts
    /// once. Less than the budget's limit is taken as that limit.
    #[must_use]
    pub fn with_max_tokens(mut self, tokens: usize) -> Self {
        self.max_tokens = tokens.max(self.budget.limit());
        self
    }

    /// Puts a sequence into the queue. `now` must not go back.
    pub fn push(&mut self, tokens: Tokens, now: Duration) -> Ticket {
        let ticket = Ticket(self.tickets);
        self.tickets += 1;
        let tokens = Key(tokens);
        let load = self.load(&tokens, &self.by_tokens);
        let arrival = Arrival {
            tokens: tokens.clone(),
            at: now,
        };
        self.by_arrival.insert(ticket, arrival);
        match self.by_tokens.entry(tokens) {
            Entry::Occupied(mut waiting) => waiting.get_mut().push(ticket),
            Entry::Vacant(place) => {
                place.insert(vec![ticket]);
                self.waiting.add(load);
            }
        }
        ticket
    }

    /// Takes a sequence out of the queue. False where it waits no more.
    pub fn cancel(&mut self, ticket: Ticket) -> bool {
        let Some(Arrival { tokens, .. }) = self.by_arrival.remove(&ticket) else {
            return false;
        };
        if let Entry::Occupied(mut waiting) = self.by_tokens.entry(tokens.clone()) {
            waiting.get_mut().retain(|&other| other != ticket);
            if waiting.get().is_empty() {
                waiting.remove();
                self.waiting.subtract(self.load(&tokens, &self.by_tokens));
            }
        }
        true
    }

    /// Number of tickets that wait.
    pub fn len(&self) -> usize {
        self.by_arrival.len()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.by_arrival.is_empty()
    }

    /// The next batch, or how long to wait for it.
    pub fn next(&mut self, now: Duration) -> Next {
        let Some(oldest) = self.by_arrival.values().next() else {
            return Next::Idle;
        };
        let due = oldest.at + self.window;
        if now < due && !self.is_full() {
            return Next::WaitUntil(due);
        }
        Next::Run(self.fill())
    }

    /// The next batch if as much waits as a batch takes: what may be prepared while another one is computed, for what arrives
    /// meanwhile would find room in it only as far as it shares.
    pub fn next_full(&mut self) -> Option<Batch> {
        (!self.is_empty() && self.is_full()).then(|| self.fill())
    }

    fn is_full(&self) -> bool {
        self.waiting.cost >= self.budget.limit() || self.waiting.tokens >= self.max_tokens
    }

    fn fill(&mut self) -> Batch {
        let mut filling = Filling::default();
        while let Some(oldest) = self.by_arrival.values().next() {
            let seed = oldest.tokens.clone();
            let load = self.load(&seed, &filling.sequences);
            if !filling.sequences.is_empty() && !self.holds(filling.load, load, 1) {
                break;
            }
            self.take(&seed, load, &mut filling);
            self.take_alike(&seed, &mut filling);
        }
        filling.into_batch()
    }

    /// What a sequence adds to others.
    fn load(&self, tokens: &Key, others: &BTreeMap<Key, Vec<Ticket>>) -> Load {
        Load {
            cost: self.budget.cost(&tokens.0, shared(others, tokens)),
            tokens: tokens.0.len(),
        }
    }

    /// Whether this part of a batch has room for both.
    fn holds(&self, taken: Load, more: Load, part: usize) -> bool {
        taken.cost + more.cost <= self.budget.limit() / part
            && taken.tokens + more.tokens <= self.max_tokens / part
    }

    /// Takes the sequences that share most with `seed`, as far as they may go ahead of older ones.
    fn take_alike(&mut self, seed: &Key, filling: &mut Filling) {
        loop {
            let neighbours = neighbours(&self.by_tokens, seed).into_iter().flatten();
            let Some(closest) = neighbours.max_by_key(|tokens| common_prefix(&tokens.0, &seed.0))
            else {
                return;
            };
            let closest = closest.clone();
            let load = self.load(&closest, &filling.sequences);
            let shared = shared(&filling.sequences, &closest);
            let worth_it = shared * SHARED_TO_GO_AHEAD >= closest.0.len();
            let fits = self.holds(filling.load, load, 1) && self.holds(filling.ahead, load, AHEAD);
            if !worth_it || !fits {
                return;
            }
            filling.ahead.add(load);
            self.take(&closest, load, filling);
        }
    }

    fn take(&mut self, tokens: &Key, load: Load, filling: &mut Filling) {
        let Some(tickets) = self.by_tokens.remove(tokens) else {
            return;
        };
        self.waiting.subtract(self.load(tokens, &self.by_tokens));
        for ticket in &tickets {
            self.by_arrival.remove(ticket);
        }
        filling.load.add(load);
        filling.sequences.insert(tokens.clone(), tickets);
    }
}

/// A batch that is being put together.
#[derive(Default)]
struct Filling {
    sequences: BTreeMap<Key, Vec<Ticket>>,
    load: Load,
    /// What of it was spent on sequences that went ahead of older ones.
    ahead: Load,
}

impl Load {
    fn add(&mut self, other: Self) {
        self.cost += other.cost;
        self.tokens += other.tokens;
    }

    fn subtract(&mut self, other: Self) {
        self.cost -= other.cost;
        self.tokens -= other.tokens;
    }
}

impl Filling {
    fn into_batch(self) -> Batch {
        let mut batch = Batch::default();
        for (Key(tokens), tickets) in self.sequences {
            let before = batch.sequences.last().map_or(&[][..], |last| &last.tokens);
            let shared = common_prefix(before, &tokens);
            batch.tokens += tokens.len() * tickets.len();
            batch.unique_tokens += tokens.len() - shared;
            batch.sequences.push(Scheduled {
                tokens,
                tickets,
                shared,
            });
        }
        batch
    }
}

/// The sequences before and after `tokens` in lexicographic order, which share most with it.
fn neighbours<'a>(sequences: &'a BTreeMap<Key, Vec<Ticket>>, tokens: &Key) -> [Option<&'a Key>; 2] {
    let before = sequences.range(..tokens.clone()).next_back();
    let after = sequences.range((Bound::Excluded(tokens.clone()), Bound::Unbounded));
    [before, after.into_iter().next()].map(|found| found.map(|(tokens, _)| tokens))
}

/// How many of `tokens` one of the other `sequences` starts with too.
fn shared(sequences: &BTreeMap<Key, Vec<Ticket>>, tokens: &Key) -> usize {
    let neighbours = neighbours(sequences, tokens).into_iter().flatten();
    let shared = neighbours.map(|other| common_prefix(&other.0, &tokens.0));
    shared.max().unwrap_or(0)
}
