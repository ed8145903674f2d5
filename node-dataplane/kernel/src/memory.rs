//! Memory of this process.

/// From this size on, a piece of memory is mapped by itself.
#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 128 * 1024;

/// From now on, large pieces of memory go back to the kernel as soon as they are freed, however
/// large the pieces before were. glibc raises the bound by itself, to the size of the largest
/// piece that was ever freed; then the buffers of every larger change come out of the heaps, and
/// small pieces that stay end up between them. Does nothing where the allocator has no such call.
pub fn map_large_pieces() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt(3) takes no pointers; since glibc 2.26 it takes the allocator's own lock, so it
    // may be called while other threads allocate.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
    }
}

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
    use std::hint::black_box;
    use std::sync::Mutex;

    use super::*;

    /// Both tests look at the memory of the whole process.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

    fn resident_kib() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    #[test]
    fn a_large_piece_that_is_freed_below_something_that_stays_is_gone_at_once() {
        let _alone = ONE_AT_A_TIME.lock();
        map_large_pieces();
        // This one would raise the bound.
        drop(black_box(vec![1_u8; 16 << 20]));
        let large = black_box(vec![1_u8; 8 << 20]);
        let stays = black_box(vec![1_u8; 1024]);
        let full = resident_kib();
        drop(large);
        let after = resident_kib();
        assert!(after + 6 * 1024 < full, "{full} KiB before, {after} KiB after");
        assert_eq!(stays.len(), 1024);
    }

    #[test]
    fn what_was_freed_below_something_that_stays_is_given_back() {
        let _alone = ONE_AT_A_TIME.lock();
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
