//! `radix-mlp serve` as a process on the loopback interface.

mod clients;
mod load;
mod options;
mod refusals;
mod reliability;
mod routes;
mod sharing;

use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;
use ureq::http::{HeaderName, Response};
use ureq::{Agent, Body};

use super::fixtures::{Fixture, HIDDEN};

/// What a test waits for at most: long enough for a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// A server on a free port, killed when dropped.
struct Server {
    process: Child,
    url: String,
    agent: Agent,
    /// What /docs says of the routes.
    api: OnceLock<Value>,
}

impl Server {
    fn start(fixture: &Fixture, options: &[&str]) -> Self {
        let mut command = fixture.command(&["serve", "-m", "model", "--port", "0"]);
        command.args(options);
        Self::spawn(command)
    }

    fn spawn(mut command: Command) -> Self {
        let command = command.stdout(Stdio::piped()).stderr(Stdio::null());
        let mut process = command.spawn().unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(process.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        let url = line
            .trim()
            .strip_prefix("listening on ")
            .unwrap()
            .to_owned();
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(DEADLINE));
        Self {
            process,
            url,
            agent: config.build().into(),
            api: OnceLock::new(),
        }
    }

    fn address(&self) -> &str {
        self.url.strip_prefix("http://").unwrap()
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address()).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        stream
    }

    fn post(&self, route: &str, body: &Value) -> Response<Body> {
        let request = self.agent.post(format!("{}{route}", self.url));
        let response = request.send_json(body).unwrap();
        self.check_documented(route, &response);
        response
    }

    /// Every status and every header of our own is in the description of its route.
    fn check_documented(&self, route: &str, response: &Response<Body>) {
        let api = self.api.get_or_init(|| {
            let request = self.agent.get(format!("{}/api-doc/openapi.json", self.url));
            request.call().unwrap().body_mut().read_json().unwrap()
        });
        let route = if route == "/" { "/embed" } else { route };
        let status = response.status();
        let documented = &api["paths"][route]["post"]["responses"][status.as_str()];
        assert!(documented.is_object(), "{route} answers {status}");
        for name in response.headers().keys().map(HeaderName::as_str) {
            if name.starts_with("x-") || name == "retry-after" {
                let header = &documented["headers"][name];
                assert!(header.is_object(), "{route} answers {status} with {name}");
            }
        }
    }

    /// The JSON of what must succeed.
    fn ok(&self, route: &str, body: &Value) -> Value {
        let mut response = self.post(route, body);
        let answer = json(&mut response);
        assert_eq!(response.status(), 200, "{route} {body}: {answer}");
        answer
    }

    /// Status and JSON of what must fail.
    fn refused(&self, route: &str, body: &Value) -> (u16, Value) {
        let mut response = self.post(route, body);
        let status = response.status().as_u16();
        assert_ne!(status, 200, "{route} {body}");
        (status, json(&mut response))
    }

    fn get(&self, route: &str) -> String {
        let mut response = self
            .agent
            .get(format!("{}{route}", self.url))
            .call()
            .unwrap();
        assert_eq!(response.status(), 200, "{route}");
        response.body_mut().read_to_string().unwrap()
    }

    /// A value of /metrics, 0 where it has none yet.
    fn metric(&self, name: &str) -> f64 {
        let metrics = self.get("/metrics");
        let mut lines = metrics.lines();
        let value = lines.find_map(|line| line.strip_prefix(&format!("{name} ")));
        value.map_or(0.0, |value| value.parse().unwrap())
    }

    fn wait_for_metric(&self, name: &str, value: f64) {
        let start = Instant::now();
        while self.metric(name) != value {
            assert!(
                start.elapsed() < DEADLINE,
                "{name} is {}",
                self.metric(name)
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn signal(&self, name: &str) {
        let id = self.process.id().to_string();
        let status = Command::new("kill")
            .args(["-s", name, &id])
            .status()
            .unwrap();
        assert!(status.success());
    }

    fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < DEADLINE, "the server does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn json(response: &mut Response<Body>) -> Value {
    response.body_mut().read_json().unwrap()
}

fn header(response: &Response<Body>, name: &str) -> usize {
    response.headers()[name].to_str().unwrap().parse().unwrap()
}

fn vector(value: &Value) -> Vec<f32> {
    let numbers = value.as_array().unwrap().iter();
    numbers
        .map(|number| number.as_f64().unwrap() as f32)
        .collect()
}

fn vectors(value: &Value) -> Vec<Vec<f32>> {
    value.as_array().unwrap().iter().map(vector).collect()
}

/// The Python that has the packages of the public clients, where there is one.
fn python() -> Option<PathBuf> {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv/bin/python");
    let python = std::env::var_os("RADIX_MLP_PYTHON").map_or(default, PathBuf::from);
    if python.exists() {
        return Some(python);
    }
    println!("skipped: no {} (set RADIX_MLP_PYTHON)", python.display());
    None
}

/// A request for the embedding of "a", as it goes over the wire.
fn request() -> String {
    let body = serde_json::json!({"inputs": "a"}).to_string();
    let length = body.len();
    format!(
        "POST /embed HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n{body}"
    )
}

fn is_well(server: &Server) {
    let found = server.ok("/embed", &serde_json::json!({"inputs": "a"}));
    assert_eq!(found[0].as_array().unwrap().len(), HIDDEN);
}

/// What the server sends until it closes the connection.
fn read_all(stream: &mut TcpStream) -> String {
    let mut answer = Vec::new();
    if let Err(error) = stream.read_to_end(&mut answer) {
        // A connection that is reset is closed too.
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    String::from_utf8_lossy(&answer).into_owned()
}
