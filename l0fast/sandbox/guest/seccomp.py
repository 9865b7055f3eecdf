"""Two seccomp filters over every session: what no cell needs, and what would reach past its own process group.

    wrong architecture         kill the process
    x32 numbers, clone3        ENOSYS (glibc then falls back to clone, whose flags can be read)
    a call in `DENIED`         EPERM
    a call in `CHECKED`        EPERM for the arguments named there
    a call in `QUIET`          0, and nothing is done: where sessions share their uid with files that are not theirs
    one in `CLOSING`           the same for a mode that leaves the owner not all of his rights
    anything else              allowed

A list of what is denied, not of what is allowed: agents' programs are not known beforehand, and Landlock, limits and
uids stand behind it. No sockets at all but socketpair: without socket() neither the network, nor a service's or a
sibling's Unix socket can be reached. setsid and setpgid are denied so that one killpg ends all of a session.
Raw BPF through prctl; numbers from the kernel's unistd tables.

The zygote is under the first, which denies all that it has no need of itself, and its forks inherit it; a session adds the
second, of the few calls that are left. With every filter the kernel translates it, and tries it on each call there is:
0.4 ms for all of it, an eighth of that for the rest.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Set

# fmt: off
DENIED = (
    "setsid setpgid socket ptrace process_vm_readv process_vm_writev process_madvise pidfd_getfd kcmp "
    "unshare setns chroot pivot_root mount umount2 move_mount open_tree fsopen fsconfig fsmount fspick mount_setattr "
    "name_to_handle_at open_by_handle_at fanotify_init fanotify_mark quotactl quotactl_fd acct swapon swapoff "
    "bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register add_key request_key keyctl "
    "init_module finit_module delete_module kexec_load kexec_file_load reboot syslog "
    "memfd_create memfd_secret shmget shmat shmctl shmdt semget semop semctl semtimedop msgget msgsnd msgrcv msgctl "
    "mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr "
    "settimeofday clock_settime clock_adjtime adjtimex sethostname setdomainname "
    "io_setup inotify_init inotify_init1 "
    "setpriority ioprio_set mbind set_mempolicy set_mempolicy_home_node migrate_pages move_pages "
    "lookup_dcookie nfsservctl vhangup iopl ioperm modify_ldt uselib ustat sysfs _sysctl"
).split()
QUIET = frozenset(
    (
        "chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utime utimes futimesat utimensat file_setattr "
        "setxattr lsetxattr fsetxattr setxattrat removexattr lremovexattr fremovexattr removexattrat"
    ).split()
)
"""What an owner may do to any of his files. Landlock leaves it to him, and no filter sees which file it is; a program that
copies one with its mode goes on without."""
QUIET_IN_NAMESPACE = frozenset(name for name in QUIET if "xattr" in name)
"""Where nothing is the owner's that can be written, but the folders of sessions, one in the other: an ACL could close that
one to all of them, as a mode could (`CLOSING`). What a session has compiled it may run."""

_X86_64 = {
    "setsid": 112, "setpgid": 109, "socket": 41, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311,
    "process_madvise": 440, "pidfd_getfd": 438, "kcmp": 312, "unshare": 272, "setns": 308, "chroot": 161,
    "pivot_root": 155, "mount": 165, "umount2": 166, "move_mount": 429, "open_tree": 428, "fsopen": 430,
    "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442, "name_to_handle_at": 303,
    "open_by_handle_at": 304, "fanotify_init": 300, "fanotify_mark": 301, "quotactl": 179, "quotactl_fd": 443,
    "acct": 163, "swapon": 167, "swapoff": 168, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323,
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "add_key": 248, "request_key": 249,
    "keyctl": 250, "init_module": 175, "finit_module": 313, "delete_module": 176, "kexec_load": 246,
    "kexec_file_load": 320, "reboot": 169, "syslog": 103, "memfd_create": 319, "memfd_secret": 447, "shmget": 29,
    "shmat": 30, "shmctl": 31, "shmdt": 67, "semget": 64, "semop": 65, "semctl": 66, "semtimedop": 220, "msgget": 68,
    "msgsnd": 69, "msgrcv": 70, "msgctl": 71, "mq_open": 240, "mq_unlink": 241, "mq_timedsend": 242,
    "mq_timedreceive": 243, "mq_notify": 244, "mq_getsetattr": 245, "settimeofday": 164, "clock_settime": 227,
    "clock_adjtime": 305, "adjtimex": 159, "sethostname": 170, "setdomainname": 171, "setpriority": 141,
    "ioprio_set": 251, "mbind": 237, "set_mempolicy": 238, "set_mempolicy_home_node": 450, "migrate_pages": 256,
    "move_pages": 279, "lookup_dcookie": 212, "nfsservctl": 180, "vhangup": 153, "iopl": 172, "ioperm": 173,
    "modify_ldt": 154, "uselib": 134, "ustat": 136, "sysfs": 139, "_sysctl": 156,
    "clone": 56, "clone3": 435, "socketpair": 53, "kill": 62, "ioctl": 16, "prlimit64": 302, "personality": 135,
    "sched_setaffinity": 203, "sched_setscheduler": 144, "sched_setparam": 142, "sched_setattr": 314,
    "io_setup": 206, "inotify_init": 253, "inotify_init1": 294,
    "chmod": 90, "fchmod": 91, "fchmodat": 268, "fchmodat2": 452, "chown": 92, "fchown": 93, "lchown": 94,
    "fchownat": 260, "utime": 132, "utimes": 235, "futimesat": 261, "utimensat": 280, "file_setattr": 469,
    "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "setxattrat": 463, "removexattr": 197, "lremovexattr": 198,
    "fremovexattr": 199, "removexattrat": 466,
}
_AARCH64 = {
    "setsid": 157, "setpgid": 154, "socket": 198, "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271,
    "process_madvise": 440, "pidfd_getfd": 438, "kcmp": 272, "unshare": 97, "setns": 268, "chroot": 51,
    "pivot_root": 41, "mount": 40, "umount2": 39, "move_mount": 429, "open_tree": 428, "fsopen": 430,
    "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442, "name_to_handle_at": 264,
    "open_by_handle_at": 265, "fanotify_init": 262, "fanotify_mark": 263, "quotactl": 60, "quotactl_fd": 443,
    "acct": 89, "swapon": 224, "swapoff": 225, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282,
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "add_key": 217, "request_key": 218,
    "keyctl": 219, "init_module": 105, "finit_module": 273, "delete_module": 106, "kexec_load": 104,
    "kexec_file_load": 294, "reboot": 142, "syslog": 116, "memfd_create": 279, "memfd_secret": 447, "shmget": 194,
    "shmat": 196, "shmctl": 195, "shmdt": 197, "semget": 190, "semop": 193, "semctl": 191, "semtimedop": 192,
    "msgget": 186, "msgsnd": 189, "msgrcv": 188, "msgctl": 187, "mq_open": 180, "mq_unlink": 181, "mq_timedsend": 182,
    "mq_timedreceive": 183, "mq_notify": 184, "mq_getsetattr": 185, "settimeofday": 170, "clock_settime": 112,
    "clock_adjtime": 266, "adjtimex": 171, "sethostname": 161, "setdomainname": 162, "setpriority": 140,
    "ioprio_set": 30, "mbind": 235, "set_mempolicy": 237, "set_mempolicy_home_node": 450, "migrate_pages": 238,
    "move_pages": 239, "lookup_dcookie": 18, "nfsservctl": 42, "vhangup": 58,
    "clone": 220, "clone3": 435, "socketpair": 199, "kill": 129, "ioctl": 29, "prlimit64": 261, "personality": 92,
    "sched_setaffinity": 122, "sched_setscheduler": 119, "sched_setparam": 118, "sched_setattr": 274,
    "io_setup": 0, "inotify_init1": 26,
    "fchmod": 52, "fchmodat": 53, "fchmodat2": 452, "fchown": 55, "fchownat": 54, "utimensat": 88, "file_setattr": 469,
    "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "setxattrat": 463, "removexattr": 14, "lremovexattr": 15,
    "fremovexattr": 16, "removexattrat": 466,
}
# fmt: on
TABLES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}

_ALL = 0xFFFFFFFF
_NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
_AF_UNIX, _SOCK_DGRAM, _SOCK_RAW = 1, 2, 3
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C

CHECKED = (
    # (call, argument, mask, value, deny where equal): deny where ((argument & mask) == value) is that
    ("clone", 0, _NEW_NAMESPACES, 0, False),
    ("socketpair", 0, _ALL, _AF_UNIX, False),
    # a datagram pair could still send to a named socket
    ("socketpair", 1, 0xF, _SOCK_DGRAM, True),
    ("socketpair", 1, 0xF, _SOCK_RAW, True),
    # everybody, where uids are shared
    ("kill", 0, _ALL, _ALL, True),
    ("ioctl", 1, _ALL, _TIOCSTI, True),
    ("ioctl", 1, _ALL, _TIOCLINUX, True),
    # another process's limits or share of the CPU, where uids are shared
    ("prlimit64", 0, _ALL, 0, False),
    ("sched_setaffinity", 0, _ALL, 0, False),
    ("sched_setscheduler", 0, _ALL, 0, False),
    ("sched_setparam", 0, _ALL, 0, False),
    ("sched_setattr", 0, _ALL, 0, False),
    # asking is fine
    ("personality", 0, _ALL, _ALL, False),
)

CLOSING = (
    # as in CHECKED
    ("chmod", 1, 0o700, 0o700, False),
    ("fchmod", 1, 0o700, 0o700, False),
    ("fchmodat", 2, 0o700, 0o700, False),
    ("fchmodat2", 2, 0o700, 0o700, False),
)

_LD, _JEQ, _JGE, _AND, _RET = 0x20, 0x15, 0x35, 0x54, 0x06
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_X32_BIT = 0x40000000
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2


ALL = frozenset(DENIED) | {check[0] for check in CHECKED}
ZYGOTE_NEEDS = frozenset({"setpgid", "setpriority", "kill"})
"""To make a session a group of its own that stands back, and to end everybody of a uid."""


def build_filter(machine: str, calls: Set[str] = ALL, quiet: Set[str] = frozenset()) -> bytes:
    """The BPF program for `machine` ("x86_64" or "aarch64"), of some of the calls. Raises ValueError for any other.

    Args:
        quiet: of QUIET; where there are any, CLOSING holds for the rest.
    """
    if machine not in TABLES:
        raise ValueError(f"no system call table for {machine!r}: the sandbox runs on {' and '.join(TABLES)}")
    arch, numbers = TABLES[machine]
    deny = (_RET, 0, 0, _ERRNO | errno.EPERM)
    missing = (_RET, 0, 0, _ERRNO | errno.ENOSYS)
    done = (_RET, 0, 0, _ERRNO)
    program = [(_LD, 0, 0, 4), (_JEQ, 1, 0, arch), (_RET, 0, 0, _KILL_PROCESS), (_LD, 0, 0, 0)]
    if machine == "x86_64":
        program += [(_JGE, 0, 1, _X32_BIT), missing]
    program += [(_JEQ, 0, 1, numbers["clone3"]), missing]
    answers = {name: deny for name in DENIED if name in calls} | dict.fromkeys(sorted(quiet), done)
    for name, answer in answers.items():
        if name in numbers:
            program += [(_JEQ, 0, 1, numbers[name]), answer]
    checks = [(check, deny) for check in CHECKED if check[0] in calls]
    checks += [(check, done) for check in CLOSING if quiet and check[0] in numbers.keys() - quiet]
    for name in dict.fromkeys(check[0] for check, _ in checks):
        body = []
        for (_, argument, mask, value, when_equal), answer in (row for row in checks if row[0][0] == name):
            # arguments start at offset 16, 8 bytes each; both machines are little-endian, so the low word comes first
            body += [(_LD, 0, 0, 16 + 8 * argument), (_AND, 0, 0, mask)]
            body += [(_JEQ, 0, 1, value) if when_equal else (_JEQ, 1, 0, value), answer]
        body.append((_RET, 0, 0, _ALLOW))
        program += [(_JEQ, 0, len(body), numbers[name]), *body]
    program.append((_RET, 0, 0, _ALLOW))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


class _Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


class Filter:
    """Built once, before the forks. `install` needs no_new_privs and can't be undone."""

    def __init__(self, calls: Set[str], quiet: Set[str] = frozenset()) -> None:
        self._code = build_filter(os.uname().machine, calls, quiet)
        self._program = _Program(len(self._code) // 8, self._code)
        self._prctl = ctypes.CDLL(None, use_errno=True).prctl

    def install(self) -> None:
        if self._prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(self._program), 0, 0) != 0:
            code = ctypes.get_errno()
            raise OSError(code, "seccomp filter refused")
