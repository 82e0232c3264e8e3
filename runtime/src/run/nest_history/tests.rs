use serde::Deserialize;
use serde_json::{Value, json};

use super::{dict, last_n, nest, remove_tools};
use crate::item::InputItem;

/// Runs with nested handoffs, and what the Agents SDK 0.24.0 showed the model in the end.
const VECTORS: &str = include_str!("vectors.json");

#[derive(Deserialize)]
struct Vector {
    history: Vec<InputItem>,
    turns: Vec<Turn>,
    input: Vec<Value>,
}

#[derive(Deserialize)]
struct Turn {
    items: Vec<InputItem>,
    nest: bool,
}

#[test]
fn histories_are_nested_as_the_sdk_nests_them() {
    let vectors: Vec<Vector> = serde_json::from_str(VECTORS).unwrap();
    assert_eq!(vectors.len(), 16);
    for Vector { mut history, turns, input } in vectors {
        let mut earlier = Vec::new();
        for turn in turns {
            if turn.nest {
                history = nest(&history, &earlier, &turn.items);
                earlier.clear();
            } else {
                earlier.extend(turn.items);
            }
        }
        let shown: Vec<Value> = history.iter().chain(&earlier).map(|item| dict::of(item).into()).collect();
        // As texts: the order of keys counts, too.
        assert_eq!(json!(shown).to_string(), json!(input).to_string());
    }
}

fn user(text: &str) -> InputItem {
    InputItem::User { text: text.into() }
}

fn assistant(text: &str) -> InputItem {
    InputItem::Assistant { text: text.into(), raw: None }
}

fn thought() -> InputItem {
    InputItem::Reasoning { text: "Hm.".into(), raw: None }
}

fn call(id: &str) -> InputItem {
    InputItem::ToolCall { call_id: id.into(), name: "look".into(), arguments: "{}".into(), raw: None }
}

fn output(id: &str) -> InputItem {
    InputItem::ToolOutput { call_id: id.into(), output: "7".into(), parts: vec![] }
}

fn hosted() -> InputItem {
    InputItem::HostedCall { raw: json!({ "type": "web_search_call", "id": "ws_1", "status": "completed" }) }
}

#[test]
fn a_summary_tells_what_went_before_and_leaves_the_rest_in_its_place() {
    let nested =
        nest(&[user("Hi")], &[hosted(), assistant("Wait.")], &[assistant("Over to them."), call("c"), output("c")]);
    let summary = |lines: &str| InputItem::Summary {
        text: format!(
            "For context, here is the conversation so far between the user and the previous agent:\n\
             <CONVERSATION HISTORY>\n{lines}\n</CONVERSATION HISTORY>"
        ),
    };
    let said = concat!(
        r#"1. {"id": "__fake_id__", "content": [{"annotations": [], "text": "Wait.", "type": "output_text", "#,
        r#""logprobs": []}], "role": "assistant", "status": "completed", "type": "message"}"#,
    );
    let pair = concat!(
        r#"1. {"arguments": "{}", "call_id": "c", "name": "look", "type": "function_call", "id": "__fake_id__"}"#,
        "\n",
        r#"2. {"call_id": "c", "output": "7", "type": "function_call_output"}"#,
    );
    assert_eq!(nested, [summary("1. user: Hi"), hosted(), summary(said), assistant("Over to them."), summary(pair)]);
    assert_eq!(nest(&[], &[], &[]), [summary("(no previous turns recorded)")]);
}

#[test]
fn without_tools_the_words_remain() {
    let items = [user("Hi"), thought(), hosted(), assistant("One moment."), call("c"), output("c"), assistant("7")];
    assert_eq!(remove_tools(&items), [user("Hi"), assistant("One moment."), assistant("7")]);
}

#[test]
fn the_last_items_are_never_torn_apart() {
    let items = [user("Hi"), thought(), call("a"), call("b"), output("a"), output("b"), assistant("7"), user("More")];
    for (n, kept) in [
        (0, &items[8..]),
        (1, &items[7..]),
        (2, &items[6..]),
        // Outputs without their calls.
        (3, &items[6..]),
        (4, &items[6..]),
        // Calls without the reasoning before them.
        (5, &items[6..]),
        (6, &items[6..]),
        (7, &items[1..]),
        (8, &items[..]),
        (100, &items[..]),
    ] {
        assert_eq!(last_n(&items, n), kept, "{n}");
    }
    let plain = [call("a"), call("b"), output("a"), output("b"), user("More")];
    assert_eq!(last_n(&plain, 4), [call("b"), output("b"), user("More")]);
    let unanswered = [user("Hi"), thought(), call("a"), user("More")];
    assert_eq!(last_n(&unanswered, 4), [user("Hi"), user("More")]);
    assert_eq!(last_n(&[thought(), hosted(), user("More")], 2), [user("More")]);
}
