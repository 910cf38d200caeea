//! The stories: each with real servers and real service processes, waiting on conditions and not on time.

mod stories {
    mod bad_input;
    mod crashes;
    mod ordinary;
    mod recovery;
}
