//! What an exit left in `kvm_run` beside what `kvm-ioctls` hands out.

use kvm_ioctls::VcpuFd;

/// Why KVM gave up, after `KVM_EXIT_INTERNAL_ERROR`.
pub(in crate::vmm) fn internal_suberror(fd: &mut VcpuFd) -> u32 {
    // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, which is when KVM fills this member; any
    // bytes are a valid `u32`, whatever the reason was.
    #[allow(unsafe_code)]
    unsafe {
        fd.get_kvm_run().__bindgen_anon_1.internal.suberror
    }
}

/// Bytes of one element of the port access, after `KVM_EXIT_IO`.
pub(in crate::vmm) fn port_element(fd: &mut VcpuFd) -> usize {
    // SAFETY: the exit reason was KVM_EXIT_IO, which is when KVM fills this member; any bytes are a
    // valid `u8`, whatever the reason was.
    #[allow(unsafe_code)]
    let size = unsafe { fd.get_kvm_run().__bindgen_anon_1.io.size };
    usize::from(size)
}

/// Puts the bytes of an `in` where KVM picks them up, after `KVM_EXIT_IO`.
pub(in crate::vmm) fn answer_port_read(fd: &mut VcpuFd, answer: &[u8]) {
    let run = fd.get_kvm_run();
    // SAFETY: the exit reason was KVM_EXIT_IO: KVM filled `io` with the offset and the size of its
    // data inside the mapped `kvm_run` area, which is `size * count` bytes, and `answer` was made
    // exactly that long or is cut to it. The area is only read by KVM, and only inside the next
    // KVM_RUN of this thread.
    #[allow(unsafe_code)]
    unsafe {
        let io = run.__bindgen_anon_1.io;
        let length = usize::from(io.size) * usize::try_from(io.count).unwrap_or(0);
        let start = std::ptr::from_mut(run).cast::<u8>();
        let data = start.add(usize::try_from(io.data_offset).unwrap_or(0));
        std::ptr::copy_nonoverlapping(answer.as_ptr(), data, answer.len().min(length));
    }
}
