//! A queue of few: most streams have one piece on its way, and thousands have none.

use std::collections::VecDeque;

/// First in, first out. The first piece takes no memory beside the queue; the room of those behind it goes with the last.
#[derive(Debug)]
pub(super) struct Queue<T> {
    first: Option<T>,
    /// Empty where there is no first.
    rest: VecDeque<T>,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { first: None, rest: VecDeque::new() }
    }
}

impl<T> Queue<T> {
    pub(super) fn push(&mut self, piece: T) {
        if self.first.is_none() {
            self.first = Some(piece);
        } else {
            self.rest.push_back(piece);
        }
    }

    pub(super) fn pop(&mut self) -> Option<T> {
        let piece = self.first.take()?;
        self.first = self.rest.pop_front();
        if self.rest.is_empty() {
            self.rest = VecDeque::new();
        }
        Some(piece)
    }

    pub(super) fn first_mut(&mut self) -> Option<&mut T> {
        self.first.as_mut()
    }

    pub(super) fn last_mut(&mut self) -> Option<&mut T> {
        self.rest.back_mut().or(self.first.as_mut())
    }
}

impl<T> From<Queue<T>> for VecDeque<T> {
    fn from(queue: Queue<T>) -> Self {
        let mut pieces = queue.rest;
        if let Some(first) = queue.first {
            pieces.push_front(first);
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_first_leaves_first() {
        let mut queue = Queue::default();
        assert_eq!(queue.pop(), None);
        (1..=3).for_each(|piece| queue.push(piece));
        assert_eq!((queue.pop(), queue.first_mut().copied(), queue.last_mut().copied()), (Some(1), Some(2), Some(3)));
        queue.push(4);
        assert_eq!(VecDeque::from(queue), [2, 3, 4]);
    }

    #[test]
    fn a_queue_of_one_has_its_first_and_last_in_one() {
        let mut queue = Queue::default();
        queue.push(1);
        *queue.last_mut().unwrap() += 1;
        assert_eq!(queue.first_mut().copied(), Some(2));
        assert_eq!(VecDeque::from(queue), [2]);
        assert!(VecDeque::from(Queue::<u8>::default()).is_empty());
    }

    #[test]
    fn what_is_empty_holds_no_memory() {
        let mut queue = Queue::default();
        queue.push(1);
        assert_eq!(queue.rest.capacity(), 0);
        queue.push(2);
        assert_ne!(queue.rest.capacity(), 0);
        while queue.pop().is_some() {}
        assert_eq!(queue.rest.capacity(), 0);
    }
}
