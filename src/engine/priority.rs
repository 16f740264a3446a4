//! Scheduling priority of the threads that compute.
//!
//! Input: how much lower. Output: the calling thread, lowered. On Linux the nice value belongs to the thread (`setpriority`
//! with id 0 means the calling thread there, against POSIX, where it means the process), so the threads of the network
//! give way to those that receive and acknowledge. Elsewhere nothing is done, because it would slow the whole process.
//!
//! Deliberately absent: raising a priority, which needs a privilege the daemon does not have.

/// Largest nice value.
pub const MAX_NICE: i32 = 19;

/// Adds `nice` to the nice value of the calling thread, up to [`MAX_NICE`]. 0 leaves it, and so does a negative value.
/// Meant for the start of a thread: a second call lowers it further.
///
/// # Errors
/// What the system says; the thread then runs as before, which is right and only less polite.
pub fn lower_this_thread(nice: i32) -> std::io::Result<()> {
    if nice <= 0 {
        return Ok(());
    }
    lower(nice)
}

#[cfg(target_os = "linux")]
fn lower(nice: i32) -> std::io::Result<()> {
    let now = rustix::process::getpriority_process(None)?;
    rustix::process::setpriority_process(None, now.saturating_add(nice).min(MAX_NICE))?;
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn lower(_nice: i32) -> std::io::Result<()> {
    Ok(())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    fn nice_now() -> i32 {
        rustix::process::getpriority_process(None).unwrap()
    }

    #[test]
    fn only_the_calling_thread_is_lowered() {
        let before = nice_now();
        let lowered = std::thread::spawn(move || {
            lower_this_thread(0).unwrap();
            assert_eq!(nice_now(), before);
            lower_this_thread(3).unwrap();
            let then = nice_now();
            lower_this_thread(100).unwrap();
            (then, nice_now())
        })
        .join()
        .unwrap();
        assert_eq!(lowered, ((before + 3).min(MAX_NICE), MAX_NICE));
        assert_eq!(nice_now(), before);
    }
}
