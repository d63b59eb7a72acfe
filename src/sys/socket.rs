//! Unix sockets: a file that goes along with a message, and who is at the other end.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    connect, getsockopt, recvmsg, sendmsg, socket, sockopt,
};
use nix::sys::stat::{Mode, umask};

/// Makes a socket that this user alone can connect to, from its first moment on.
///
/// # Errors
/// As `bind`: `EADDRINUSE` if there is anything at `path`.
pub fn bind_private(path: &Path) -> io::Result<UnixListener> {
    // The mask is the process's: another thread that makes a file right now gets a stricter one.
    let before = umask(Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    umask(before);
    listener
}

/// Whether a process has the socket at `path`, which does not notice that it was asked: who connects
/// with another type than the socket has is told so by the kernel, if there is one.
///
/// # Errors
/// As `connect`: what keeps it from being known.
pub fn is_bound(path: &Path) -> io::Result<bool> {
    let probe = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    match connect(probe.as_raw_fd(), &UnixAddr::new(path)?) {
        Err(Errno::ECONNREFUSED) => Ok(false),
        Ok(()) | Err(Errno::EPROTOTYPE | Errno::EAGAIN) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// The user at the other end when it connected.
///
/// # Errors
/// As `getsockopt`.
pub fn peer_uid(socket: &UnixStream) -> io::Result<u32> {
    Ok(getsockopt(socket, sockopt::PeerCredentials)?.uid())
}

/// Sends bytes and a descriptor of `file` without waiting; returns how many bytes went.
///
/// # Errors
/// As `sendmsg`; `EAGAIN` if the socket takes nothing now.
pub fn send_with_file(socket: &UnixStream, bytes: &[u8], file: &File) -> io::Result<usize> {
    let descriptors = [file.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&descriptors)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    Ok(sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], &control, flags, None)?)
}

/// Receives bytes, and the file that came along with them, if one did.
///
/// # Errors
/// As `recvmsg`.
pub fn receive_with_file(
    socket: &UnixStream,
    bytes: &mut [u8],
) -> io::Result<(usize, Option<File>)> {
    let mut room = cmsg_space!([RawFd; 1]);
    let mut vector = [IoSliceMut::new(bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut vector, Some(&mut room), flags)?;
    let mut file = None;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control {
            for descriptor in descriptors {
                // SAFETY: the kernel has just made this descriptor for us, and nothing else knows
                // it. Those beyond the first are closed at once.
                let received = unsafe { File::from_raw_fd(descriptor) };
                file.get_or_insert(received);
            }
        }
    }
    Ok((message.bytes, file))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_file_goes_along_with_its_message() {
        let (one, two) = UnixStream::pair().unwrap();
        let mut sent = tempfile::tempfile().unwrap();
        sent.write_all(b"inside").unwrap();
        sent.rewind().unwrap();
        assert_eq!(send_with_file(&one, b"hello", &sent).unwrap(), 5);
        let mut bytes = [0; 16];
        let (count, file) = receive_with_file(&two, &mut bytes).unwrap();
        assert_eq!(&bytes[..count], b"hello");
        let mut inside = String::new();
        file.unwrap().read_to_string(&mut inside).unwrap();
        assert_eq!(inside, "inside");
        (&one).write_all(b"none").unwrap();
        assert!(receive_with_file(&two, &mut bytes).unwrap().1.is_none());
        assert_eq!(peer_uid(&one).unwrap(), nix::unistd::geteuid().as_raw());
    }

    #[test]
    fn a_private_socket_is_one_from_the_start() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let _listener = bind_private(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let taken = bind_private(&path).unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn who_asks_whether_a_socket_is_served_is_not_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = bind_private(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        assert!(is_bound(&path).unwrap());
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(listener);
        assert!(!is_bound(&path).unwrap(), "its process has ended");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(is_bound(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
