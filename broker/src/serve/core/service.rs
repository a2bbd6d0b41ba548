//! `org.varlink.service`: what the daemon says of itself.

use serde_json::{Value, json};

use super::parameters;
use crate::connection::{Connection, End};
use crate::protocol::{DESCRIPTION, INTERFACE};
use crate::serve::audit::bounded;
use crate::wire::Call;

pub(super) fn info() -> Value {
    json!({
        "vendor": "broker",
        "product": "broker",
        "version": env!("CARGO_PKG_VERSION"),
        "url": "",
        "interfaces": ["org.varlink.service", INTERFACE],
    })
}

pub(super) async fn describe(connection: &Connection, call: &Call<'_>) -> Result<(), End> {
    #[derive(serde::Deserialize)]
    struct Wanted {
        interface: String,
    }
    let Wanted { interface } = parameters(call)?;
    match interface.as_str() {
        INTERFACE => connection.reply(json!({ "description": DESCRIPTION }), false).await,
        "org.varlink.service" => {
            connection
                .reply(json!({ "description": include_str!("../../org.varlink.service.varlink") }), false)
                .await
        }
        _ => {
            let error = "org.varlink.service.InterfaceNotFound".to_owned();
            connection.error(error, json!({ "interface": bounded(&interface) })).await
        }
    }
}
