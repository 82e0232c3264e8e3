//! Where scenarios are played: one server, one SDK, and a few stages on which scenarios are played at the same time.

use std::panic::AssertUnwindSafe;
use std::sync::LazyLock;

use cloister_tests::app::PROVIDER_KEY;
use cloister_tests::{Tenant, TestApp};
use futures_util::FutureExt;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio::sync::{Mutex, MutexGuard};

use crate::compare::{self, Side};
use crate::ours;
use crate::scenario::{Api, Scenario};
use crate::script::Servers;
use crate::sdk::Sdk;

/// Scenarios that are played at the same time.
pub const STAGES: usize = 4;

/// Plays scenarios.
pub struct Theatre {
    runtime: Runtime,
    house: House,
}

struct House {
    stages: Mutex<mpsc::UnboundedReceiver<Stage>>,
    free: mpsc::UnboundedSender<Stage>,
    sdk: Sdk,
    // Goes on to the end of the process, whose scope ends it.
    _app: TestApp,
}

/// A tenant, with servers for each side.
struct Stage {
    number: usize,
    tenant: Tenant,
    ours: Servers,
    sdk: Servers,
}

impl Theatre {
    /// The one of this process, opened at its first use.
    pub fn current() -> &'static Theatre {
        static THEATRE: LazyLock<Theatre> = LazyLock::new(|| {
            let runtime = Runtime::new().expect("a runtime");
            let house = runtime.block_on(House::open());
            Theatre { runtime, house }
        });
        &THEATRE
    }

    /// Plays a scenario on both sides.
    ///
    /// # Errors
    /// They differ: the first difference, or why one side can't play it.
    pub fn compare(&self, scenario: &Scenario, api: Api) -> Result<(), String> {
        self.runtime.block_on(self.house.compare(scenario, api))
    }
}

impl House {
    async fn open() -> House {
        let (free, stages) = mpsc::unbounded_channel();
        let mut app = TestApp::builder().config(&config());
        let mut servers = Vec::new();
        for number in 0..STAGES {
            let (ours, sdk) = (Servers::start().await, Servers::start().await);
            for api in Api::ALL {
                let provider = format!("CLOISTER_PROVIDERS__{}_{number}", api.name().to_uppercase());
                app = app.env(&format!("{provider}__BASE_URL"), &ours.model.url());
                app = app.env(&format!("{provider}__API_KEY"), PROVIDER_KEY);
                if api == Api::Responses {
                    app = app.env(&format!("{provider}__API"), api.name());
                }
            }
            servers.push((ours, sdk));
        }
        let (app, sdk) = tokio::join!(app.start(), Sdk::start());
        for (number, (ours, sdk)) in servers.into_iter().enumerate() {
            let tenant = app.tenant(&format!("stage {number}")).await;
            free.send(Stage { number, tenant, ours, sdk }).unwrap_or_else(|_| unreachable!("the receiver is here"));
        }
        House { stages: Mutex::new(stages), free, sdk, _app: app }
    }

    async fn compare(&self, scenario: &Scenario, api: Api) -> Result<(), String> {
        let stage = {
            let mut stages: MutexGuard<'_, _> = self.stages.lock().await;
            stages.recv().await.expect("this holds a sender")
        };
        // A side that can't go on panics, and the stage is needed after that.
        let played = AssertUnwindSafe(stage.play(&self.sdk, scenario, api)).catch_unwind().await;
        let _ = self.free.send(stage);
        match played {
            Ok(None) => Ok(()),
            Ok(Some(difference)) => Err(difference),
            Err(panic) => Err(said(&*panic)),
        }
    }
}

impl Stage {
    async fn play(&self, sdk: &Sdk, scenario: &Scenario, api: Api) -> Option<String> {
        let (our_play, sdk_play) = (self.ours.play(scenario), self.sdk.play(scenario));
        let theirs = sdk.play(scenario, api, &self.sdk).await;
        let ours = ours::play(&self.tenant.client, &model(api, self.number), scenario, &self.ours).await;
        let ours = Side { asked: self.ours.asked(&our_play), runs: ours };
        let sdk = Side { asked: self.sdk.asked(&sdk_play), runs: theirs };
        compare::difference(scenario, &ours, &sdk)
    }
}

fn said(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_else(|| "a panic".to_owned())
}

fn model(api: Api, stage: usize) -> String {
    format!("{}-{stage}", api.name())
}

/// A model of each API for each stage, and a plan without limits that these tests would meet.
fn config() -> String {
    let mut config = r#"
[plans.pro]
base_price = "49.00"
included_tokens = 1000000000000
overage_per_million = "5.00"
monthly_token_limit = 1000000000000
max_concurrent_runs = 50
requests_per_minute = 10000000
weight = 4
"#
    .to_owned();
    for (api, stage) in Api::ALL.into_iter().flat_map(|api| (0..STAGES).map(move |stage| (api, stage))) {
        config += &format!(
            r#"
[[models]]
name = "{}"
provider = "{}_{stage}"
upstream = "scripted-1"
context_window = 128000
max_output_tokens = 16384
[models.price]
input = "1.00"
output = "2.00"
cache_read = "0.50"
cache_write = "1.25"
"#,
            model(api, stage),
            api.name(),
        );
    }
    config
}
