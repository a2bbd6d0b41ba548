//! Sessions with real processes: a Messages server that we did not write (fakellm) behind nginx that demands a key, a daemon, SQLite and
//! PostgreSQL, and `kill -9`.

#[path = "harness/crashes.rs"]
mod crashes;
#[path = "harness/hosts.rs"]
mod hosts;
#[path = "harness/model.rs"]
mod model;
#[path = "harness/people.rs"]
mod people;
#[path = "harness/scene.rs"]
mod scene;
#[path = "harness/secrets.rs"]
mod secrets;
#[path = "harness/store.rs"]
mod store;
#[path = "harness/tools.rs"]
mod tools;
