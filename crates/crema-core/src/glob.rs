//! Glob patterns as `SCAN MATCH` knows them.
//!
//! `*` any bytes, `?` one byte, `[abc]` `[a-z]` one of a class, `[^a]` one outside of it, `\x` the byte `x` itself.
//! Bytes, not characters. As in Redis a class that is never closed ends with the pattern, and a range may run downwards.
//!
//! The matcher keeps only the last `*` to come back to: everything but a star consumes exactly one byte, so an earlier
//! star could gain nothing by swallowing more. Hence no recursion, and at most pattern length times text length steps.

/// Longest pattern in bytes that an operation may carry. Matching costs up to pattern times key length, and keys may be
/// long, so this is what bounds the time of one comparison.
pub const MAX_PATTERN_BYTES: usize = 1024;

/// Whether the whole of `text` matches `pattern`. Total: any bytes are a pattern.
///
/// ```
/// use crema_core::glob::glob_match;
/// assert!(glob_match(b"user:[0-9]*", b"user:42"));
/// assert!(!glob_match(b"user:?", b"user:42"));
/// ```
pub fn glob_match(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    // Pattern position behind the last star, and the text position up to which that star has swallowed.
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        if pattern.get(p) == Some(&b'*') {
            p += 1;
            if p == pattern.len() {
                return true;
            }
            star = Some((p, t));
            continue;
        }
        if let Some(consumed) = match_one(&pattern[p..], text[t]) {
            p += consumed;
            t += 1;
        } else if let Some((behind, swallowed)) = star {
            p = behind;
            t = swallowed + 1;
            star = Some((behind, t));
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|&b| b == b'*')
}

/// Matches one byte against the first item of `pattern`, which is no star. Returns the length of that item.
fn match_one(pattern: &[u8], byte: u8) -> Option<usize> {
    match *pattern {
        [] => None,
        [b'?', ..] => Some(1),
        [b'[', ..] => match_class(pattern, byte),
        [b'\\', literal, ..] => (literal == byte).then_some(2),
        [literal, ..] => (literal == byte).then_some(1),
    }
}

/// Matches one byte against the class at the beginning of `pattern`. Returns the length of the class.
fn match_class(pattern: &[u8], byte: u8) -> Option<usize> {
    let negated = pattern.get(1) == Some(&b'^');
    let mut at = if negated { 2 } else { 1 };
    let mut hit = false;
    loop {
        at += match *pattern.get(at..).unwrap_or_default() {
            [] => break,
            [b'\\', literal, ..] => {
                hit |= literal == byte;
                2
            }
            [b']', ..] => {
                at += 1;
                break;
            }
            [from, b'-', to, ..] => {
                hit |= (from.min(to)..=from.max(to)).contains(&byte);
                3
            }
            [literal, ..] => {
                hit |= literal == byte;
                1
            }
        };
    }
    (hit != negated).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_as_redis_reads_them() {
        for (pattern, yes, no) in [
            ("*", vec!["", "a", "abc"], vec![]),
            ("", vec![""], vec!["a"]),
            ("?", vec!["a", "*"], vec!["", "ab"]),
            ("a*", vec!["a", "ab", "abc"], vec!["", "ba"]),
            ("*c", vec!["c", "abc", "cc"], vec!["cb", ""]),
            ("a*b*c", vec!["abc", "aXbYc", "abbcc", "abcbc"], vec!["ab", "acb"]),
            ("a**c", vec!["ac", "abc"], vec!["ab"]),
            ("h[ae]llo", vec!["hello", "hallo"], vec!["hillo", "hllo"]),
            ("h[^e]llo", vec!["hallo", "h^llo"], vec!["hello", "hllo"]),
            ("h[a-b]llo", vec!["hallo", "hbllo"], vec!["hcllo"]),
            ("h[b-a]llo", vec!["hallo", "hbllo"], vec!["hcllo"]),
            (r"\*", vec!["*"], vec!["a", r"\*"]),
            (r"a\?b", vec!["a?b"], vec!["axb"]),
            (r"[\]]", vec!["]"], vec![r"\", "a"]),
            (r"[\-a]", vec!["-", "a"], vec!["b"]),
            ("[abc", vec!["a", "c"], vec!["d", "[abc"]),
            ("[", vec![], vec!["[", "a"]),
            ("[^", vec!["a", "["], vec!["", "ab"]),
            ("[]a", vec![], vec!["a", "]a"]),
            ("[a-]", vec!["a", "]", "^"], vec!["-", "b"]),
            (r"\", vec![r"\"], vec!["", "a"]),
            ("user:*:[0-9]?", vec!["user::12", "user:x:y:9z"], vec!["user:x:a1"]),
        ] {
            for text in yes {
                assert!(glob_match(pattern.as_bytes(), text.as_bytes()), "{pattern} should match {text:?}");
            }
            for text in no {
                assert!(!glob_match(pattern.as_bytes(), text.as_bytes()), "{pattern} should not match {text:?}");
            }
        }
    }

    #[test]
    fn bytes_above_ascii_are_bytes() {
        assert!(glob_match(b"?\xff[\x80-\x90]", b"\x00\xff\x85"));
        assert!(!glob_match(b"[\x80-\x90]", b"\x7f"));
    }

    /// The textbook recursion, as the thing to compare with.
    fn slow(p: &[u8], t: &[u8]) -> bool {
        match (p, t) {
            ([b'*', rest @ ..], _) => slow(rest, t) || (!t.is_empty() && slow(p, &t[1..])),
            ([], _) => t.is_empty(),
            (_, []) => false,
            _ => match_one(p, t[0]).is_some_and(|n| slow(&p[n..], &t[1..])),
        }
    }

    proptest::proptest! {
        #[test]
        fn agrees_with_the_recursive_definition(p in r"[ab*?\[\]^\\-]{0,10}", t in "[ab^-]{0,8}") {
            assert_eq!(glob_match(p.as_bytes(), t.as_bytes()), slow(p.as_bytes(), t.as_bytes()));
        }
    }

    #[test]
    fn a_hostile_pattern_ends() {
        // Exponential for a matcher that backtracks into every star.
        let pattern = b"*a".repeat(500);
        assert!(!glob_match(&pattern, &[b"a".repeat(400), b"b".to_vec()].concat()));
    }
}
