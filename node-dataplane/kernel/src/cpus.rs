//! How many processors this machine has.

/// Processors that are online, whatever part of them this process may use. 1 where the kernel
/// does not say.
pub fn online() -> u32 {
    std::fs::read_to_string("/sys/devices/system/cpu/online").ok().and_then(|text| count(&text)).unwrap_or(1)
}

/// Counts a list like `0-3,8`.
fn count(list: &str) -> Option<u32> {
    let ranges = list.trim().split(',').map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        last.parse::<u32>().ok()?.checked_sub(first.parse().ok()?)?.checked_add(1)
    });
    ranges.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors_are_counted() {
        assert_eq!(count("0\n"), Some(1));
        assert_eq!(count("0-3,8,10-11"), Some(7));
        assert_eq!(count(""), None);
        assert_eq!(count("3-1"), None);
        let known = std::thread::available_parallelism().unwrap().get();
        assert!(usize::try_from(online()).unwrap() >= known, "at least those this process may use");
    }
}
