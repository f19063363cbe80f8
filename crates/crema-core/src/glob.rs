//! Glob patterns as Redis matches them: `*`, `?`, `[abc]`, `[^a]`, `[a-z]` and `\x`. Iterative: a pattern from a client
//! must not drive recursion (CVE-2024-31228).

/// Whether `text` matches `pattern` as a whole.
pub fn glob_match(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    // Where to go on if what follows the last star does not match here.
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        if p < pattern.len() && pattern[p] == b'*' {
            star = Some((p + 1, t));
            p += 1;
            continue;
        }
        if let Some(next) = match_one(pattern, p, text[t]) {
            p = next;
            t += 1;
            continue;
        }
        match star {
            Some((after, from)) => {
                star = Some((after, from + 1));
                p = after;
                t = from + 1;
            }
            None => return false,
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

/// Matches one byte with the element at `p`; returns where the next element begins.
fn match_one(pattern: &[u8], p: usize, byte: u8) -> Option<usize> {
    match *pattern.get(p)? {
        b'?' => Some(p + 1),
        b'[' => {
            let mut i = p + 1;
            let negated = pattern.get(i) == Some(&b'^');
            i += usize::from(negated);
            let mut hit = false;
            loop {
                match pattern.get(i) {
                    // An unclosed class ends with the pattern, as in Redis.
                    None => break,
                    Some(b']') => {
                        i += 1;
                        break;
                    }
                    Some(b'\\') if i + 1 < pattern.len() => {
                        hit |= pattern[i + 1] == byte;
                        i += 2;
                    }
                    Some(&low) if pattern.get(i + 1) == Some(&b'-') && i + 2 < pattern.len() => {
                        let high = pattern[i + 2];
                        hit |= (low.min(high)..=low.max(high)).contains(&byte);
                        i += 3;
                    }
                    Some(&c) => {
                        hit |= c == byte;
                        i += 1;
                    }
                }
            }
            (hit != negated).then_some(i)
        }
        b'\\' if p + 1 < pattern.len() => (pattern[p + 1] == byte).then_some(p + 2),
        c => (c == byte).then_some(p + 1),
    }
}
