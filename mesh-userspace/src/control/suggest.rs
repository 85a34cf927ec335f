//! The nearest valid name to a misspelt one.

/// Candidates that are looked at; a catalog may offer very many.
const MAX_CANDIDATES: usize = 1_000;

/// The candidate that is nearest to `wrong`, if one is near enough to be meant; the first of equals.
pub(super) fn nearest<'a>(wrong: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // Longer input cannot be near anything we offer, and the distance is quadratic.
    if wrong.len() > 80 {
        return None;
    }
    let allowed = wrong.chars().count().div_ceil(3).max(1);
    candidates
        .into_iter()
        .take(MAX_CANDIDATES)
        .map(|candidate| (distance(&wrong.to_lowercase(), &candidate.to_lowercase()), candidate))
        .filter(|(distance, _)| *distance <= allowed)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// `did you mean ...?` for [`nearest`], else the whole list if it is short enough to read.
pub(super) fn help<'a>(wrong: &str, candidates: impl IntoIterator<Item = &'a str> + Clone) -> Option<String> {
    if let Some(near) = nearest(wrong, candidates.clone()) {
        return Some(format!("did you mean `{near}`?"));
    }
    let all: Vec<_> = candidates.into_iter().take(13).map(|candidate| format!("`{candidate}`")).collect();
    (!all.is_empty() && all.len() <= 12).then(|| format!("expected one of {}", all.join(", ")))
}

/// Whether `wrong` is `right` with a letter or two amiss.
pub(super) fn is_slip(wrong: &str, right: &str) -> bool {
    wrong.len() <= 80 && distance(&wrong.to_lowercase(), &right.to_lowercase()) <= 2
}

/// Optimal string alignment distance: insertions, deletions, substitutions and swaps of neighbours.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows: [Vec<usize>; 3] = [vec![0; b.len() + 1], (0..=b.len()).collect(), vec![0; b.len() + 1]];
    for i in 1..=a.len() {
        rows[2][0] = i;
        for j in 1..=b.len() {
            let substitution = rows[1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = substitution.min(rows[1][j] + 1).min(rows[2][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[0][j - 2] + 1);
            }
            rows[2][j] = best;
        }
        rows.rotate_left(1);
    }
    rows[1][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_count_edits() {
        for (a, b, expected) in
            [("", "", 0), ("a", "", 1), ("", "ab", 2), ("port", "prot", 1), ("kitten", "sitting", 3), ("ca", "abc", 3)]
        {
            assert_eq!(distance(a, b), expected, "{a} {b}");
            assert_eq!(distance(b, a), expected, "{b} {a}");
        }
    }

    #[test]
    fn only_what_is_near_is_suggested() {
        let fields = ["selector", "ports", "clusterIP", "clusterIPs"];
        assert_eq!(nearest("selectr", fields), Some("selector"));
        assert_eq!(nearest("clusterip", fields), Some("clusterIP"));
        assert_eq!(nearest("port", fields), Some("ports"));
        assert_eq!(nearest("replicas", fields), None);
        assert_eq!(nearest(&"x".repeat(10_000), fields), None);
    }
}
