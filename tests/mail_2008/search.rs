//! Breadth-first search through all interleavings of a few actors' steps.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

/// What an actor does after a step.
pub(crate) enum Then {
    /// Its next step; after the last it has ended.
    Next,
    /// The step of this name.
    Go(&'static str),
    /// The step cannot be done now: it has not happened.
    Wait,
    /// Nothing more.
    End,
}

/// One atomic step: its name, and what it does to the state that all actors share.
pub(crate) struct Step<S>(pub(crate) &'static str, pub(crate) fn(&mut S) -> Then);

pub(crate) struct Actor<S> {
    pub(crate) name: &'static str,
    pub(crate) steps: Vec<Step<S>>,
}

/// The shortest way to a loss.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Loss {
    pub(crate) what: &'static str,
    /// `actor: step`, in order.
    pub(crate) steps: Vec<String>,
}

#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) loss: Option<Loss>,
    /// Different states that were reached.
    pub(crate) states: usize,
    /// Of these, how many in which every actor has ended.
    pub(crate) ends: usize,
}

/// The shared state and where each actor is; `None` if it has ended.
type Node<S> = (S, Vec<Option<usize>>);

/// Goes through every state that the actors can reach from `start`. Stops at the first in which
/// `lost` finds something, or in which nobody can go on though somebody has not ended.
pub(crate) fn explore<S: Clone + Eq + Hash>(
    actors: &[Actor<S>],
    start: S,
    lost: fn(&S) -> Option<&'static str>,
) -> Outcome {
    let first: Node<S> = (start, vec![Some(0); actors.len()]);
    // Each state with the one before it and the step in between.
    let mut found: HashMap<Node<S>, Option<(Node<S>, String)>> = HashMap::new();
    found.insert(first.clone(), None);
    let mut queue = VecDeque::from([first]);
    let mut ends = 0;
    while let Some(node) = queue.pop_front() {
        let next = successors(actors, &node);
        let ended = node.1.iter().all(Option::is_none);
        ends += usize::from(ended);
        let stuck = (next.is_empty() && !ended).then_some("nobody can go on");
        if let Some(what) = lost(&node.0).or(stuck) {
            let loss = Loss { what, steps: way_to(&found, node) };
            return Outcome { loss: Some(loss), states: found.len(), ends };
        }
        for (step, after) in next {
            if !found.contains_key(&after) {
                found.insert(after.clone(), Some((node.clone(), step)));
                queue.push_back(after);
            }
        }
    }
    Outcome { loss: None, states: found.len(), ends }
}

fn successors<S: Clone>(actors: &[Actor<S>], node: &Node<S>) -> Vec<(String, Node<S>)> {
    let mut all = Vec::new();
    for (number, actor) in actors.iter().enumerate() {
        let Some(at) = node.1[number] else {
            continue;
        };
        let Step(name, run) = &actor.steps[at];
        let (mut state, mut places) = node.clone();
        places[number] = match run(&mut state) {
            Then::Next => Some(at + 1).filter(|&next| next < actor.steps.len()),
            Then::Go(name) => Some(actor.place(name)),
            Then::Wait => continue,
            Then::End => None,
        };
        all.push((format!("{}: {name}", actor.name), (state, places)));
    }
    all
}

impl<S> Actor<S> {
    fn place(&self, name: &str) -> usize {
        let place = self.steps.iter().position(|step| step.0 == name);
        place.unwrap_or_else(|| panic!("{} has no step {name:?}", self.name))
    }
}

/// The same actors, for whom this step does nothing.
pub(crate) fn without<S>(mut actors: Vec<Actor<S>>, name: &str) -> Vec<Actor<S>> {
    let step = actors.iter_mut().flat_map(|actor| &mut actor.steps).find(|step| step.0 == name);
    step.unwrap_or_else(|| panic!("nobody has a step {name:?}")).1 = |_| Then::Next;
    actors
}

fn way_to<S: Eq + Hash>(
    found: &HashMap<Node<S>, Option<(Node<S>, String)>>,
    node: Node<S>,
) -> Vec<String> {
    let mut steps = Vec::new();
    let mut node = &node;
    while let Some(Some((before, step))) = found.get(node) {
        steps.push(step.clone());
        node = before;
    }
    steps.reverse();
    steps
}

/// Asserts that the shortest loss is this one, by these steps.
#[track_caller]
pub(crate) fn assert_lost(outcome: &Outcome, what: &str, steps: &[&str]) {
    let loss = outcome.loss.as_ref().expect("nothing was lost");
    assert_eq!(loss.what, what, "after {:#?}", loss.steps);
    assert_eq!(loss.steps, steps);
}

/// Asserts that nothing is lost in any order, in a search that got to the end of the actors.
#[track_caller]
pub(crate) fn assert_nothing_lost(outcome: &Outcome) {
    assert_eq!(outcome.loss, None);
    assert!(outcome.ends > 0, "no order of the steps comes to its end");
}

#[test]
fn the_search_finds_the_shortest_of_several_ways_and_a_deadlock() {
    let add = || {
        Step("adds one", |sum: &mut u32| {
            *sum += 1;
            Then::Next
        })
    };
    let double = Step("doubles", |sum: &mut u32| {
        *sum *= 2;
        Then::Next
    });
    let actors = [
        Actor { name: "adder", steps: vec![add(), add(), add()] },
        Actor { name: "doubler", steps: vec![double] },
    ];
    let four = |sum: &u32| (*sum == 4).then_some("four");
    let steps = ["adder: adds one", "adder: adds one", "doubler: doubles"];
    assert_lost(&explore(&actors, 0, four), "four", &steps);
    let seven = |sum: &u32| (*sum == 7).then_some("seven");
    let outcome = explore(&actors, 0, seven);
    assert_nothing_lost(&outcome);
    // Not doubled: 0 to 3. Doubled: 0, 1 or 2, 2 to 4, and of the last 3, 4, 5 and 6.
    assert_eq!((outcome.states, outcome.ends), (4 + 1 + 2 + 3 + 4, 4));

    let waits = Actor { name: "waiter", steps: vec![Step("waits", |_: &mut u32| Then::Wait)] };
    assert_lost(&explore(&[waits], 0, |_| None), "nobody can go on", &[]);
}
