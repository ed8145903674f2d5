//! Memory of this process.

/// Gives memory that was freed and is kept for reuse back to the kernel. After a large piece of
/// work that is most of the process; it takes some milliseconds. Does nothing where the
/// allocator has no such call.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) takes no pointers, may be called at any time from any thread, and
    // touches only memory that nobody has allocated.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
#[cfg(target_env = "gnu")]
mod tests {
    use super::*;

    fn resident_kib() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    #[test]
    fn what_was_freed_below_something_that_stays_is_given_back() {
        let mut blocks: Vec<Vec<u8>> = (0..64 * 1024).map(|_| vec![1; 1024]).collect();
        // The newest stays, so that the allocator cannot shrink its heap from the top.
        let stays = blocks.pop().unwrap();
        let full = resident_kib();
        drop(blocks);
        give_back();
        let after = resident_kib();
        assert!(after + 32 * 1024 < full, "{full} KiB before, {after} KiB after");
        assert_eq!(stays.len(), 1024);
    }
}
