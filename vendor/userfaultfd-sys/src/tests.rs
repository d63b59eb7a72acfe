use super::*;

/// A message as the kernel writes it, decoded through the union.
#[test]
fn a_fault_message_decodes() {
    let mut raw = [0u8; 32];
    raw[0] = 0x12;
    raw[8] = 0x05; // write to a page that is in the page cache
    raw[16..24].copy_from_slice(&0x7f00_1234_5000u64.to_ne_bytes());
    raw[24..28].copy_from_slice(&4321u32.to_ne_bytes());
    // SAFETY: `uffd_msg` is 32 bytes of integers (asserted above), any bit pattern is one.
    let message: uffd_msg = unsafe { core::mem::transmute(raw) };
    assert_eq!(message.event, UFFD_EVENT_PAGEFAULT);
    // SAFETY: all members of the union are integers, any bit pattern is one.
    let (fault, thread) = unsafe { (message.arg.pagefault, message.arg.pagefault.feat.ptid) };
    assert_eq!(fault.flags, UFFD_PAGEFAULT_FLAG_WRITE | UFFD_PAGEFAULT_FLAG_MINOR);
    assert_eq!(fault.address, 0x7f00_1234_5000);
    assert_eq!(thread, 4321);
}

#[test]
fn every_feature_is_in_the_mask_once() {
    let features = [
        UFFD_FEATURE_PAGEFAULT_FLAG_WP,
        UFFD_FEATURE_EVENT_FORK,
        UFFD_FEATURE_EVENT_REMAP,
        UFFD_FEATURE_EVENT_REMOVE,
        UFFD_FEATURE_MISSING_HUGETLBFS,
        UFFD_FEATURE_MISSING_SHMEM,
        UFFD_FEATURE_EVENT_UNMAP,
        UFFD_FEATURE_SIGBUS,
        UFFD_FEATURE_THREAD_ID,
        UFFD_FEATURE_MINOR_HUGETLBFS,
        UFFD_FEATURE_MINOR_SHMEM,
        UFFD_FEATURE_EXACT_ADDRESS,
        UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
        UFFD_FEATURE_WP_UNPOPULATED,
        UFFD_FEATURE_POISON,
        UFFD_FEATURE_WP_ASYNC,
        UFFD_FEATURE_MOVE,
    ];
    let sum: u64 = features.iter().sum();
    assert_eq!(sum, UFFD_API_FEATURES, "a sum equals the union only if no bit repeats");
}
