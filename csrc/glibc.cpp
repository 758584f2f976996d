// libstdc++'s reference counts ask __libc_single_threaded, which glibc has had since 2.32, whether
// they may do without atomics. This one says no, so that a binary loads with the older glibc that
// torch's own wheels are made for.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
