//! The stories: each with real servers and real service processes, waiting on conditions and not on time.

mod stories {
    mod accidents;
    mod attacks;
    mod bad_input;
    mod crashes;
    mod deaf;
    mod file_agents;
    mod judgement;
    mod mass_failure;
    mod ordinary;
    mod pools;
    mod recovery;
    mod reservations;
    mod simulated;
    mod slots;
    mod takeover;
}
