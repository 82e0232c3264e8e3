use super::*;

fn event(json: Value) -> Event {
    serde_json::from_str(&json.to_string()).unwrap()
}

fn redactor() -> Redactor {
    Redactor::new(None)
}

/// What the last of some events comes to.
fn last(events: &[Value]) -> Result<Option<AnswerEvent>, Cut> {
    let mut assembly = Assembly::default();
    let (last, before) = events.split_last().unwrap();
    for json in before {
        assembly.add(event(json.clone()), &redactor()).unwrap();
    }
    assembly.add(event(last.clone()), &redactor())
}

fn added(index: u32, item: Value) -> Value {
    json!({"type": "response.output_item.added", "output_index": index, "item": item})
}

fn delta(kind: &str, index: u32, delta: &str) -> Value {
    json!({"type": format!("response.{kind}.delta"), "output_index": index, "delta": delta})
}

fn completed(output: Value) -> Value {
    json!({"type": "response.completed", "response": {"output": output}})
}

fn completion(output: Value) -> Completion {
    match last(&[completed(output)]) {
        Ok(Some(AnswerEvent::Complete(completion))) => completion,
        other => panic!("not complete: {other:?}"),
    }
}

fn call(arguments: Value) -> Value {
    json!({"id": "fc_1", "type": "function_call", "call_id": "c", "name": "f", "arguments": arguments})
}

fn message(content: Value) -> Value {
    json!({"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": content})
}

fn text(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": []})
}

#[test]
fn parts_have_their_places_and_their_items() {
    let reasoning = json!({"id": "rs_1", "type": "reasoning", "summary": [{"text": "a"}, {"text": "b"}]});
    let search = json!({"id": "ws_1", "type": "web_search_call", "status": "completed"});
    let said = message(json!([text("Hi "), text("you")]));
    let unknown = json!({"id": "x", "type": "telepathy"});
    let completion = completion(json!([reasoning, search, unknown, said, call(json!("{}"))]));
    assert_eq!(
        completion.parts,
        [
            Part::Reasoning { index: 0, text: "a\nb".to_owned(), raw: Some(reasoning) },
            Part::HostedCall { index: 1, id: "ws_1".to_owned(), name: "web_search_call".to_owned(), raw: search },
            Part::Message { index: 3, text: "Hi you".to_owned(), raw: Some(said) },
            Part::ToolCall {
                index: 4,
                call_id: "c".to_owned(),
                name: "f".to_owned(),
                arguments: "{}".to_owned(),
                raw: Some(call(json!("{}"))),
            },
        ]
    );
    assert_eq!((completion.finish, completion.usage), (Finish::Stop, None));
}

#[test]
fn texts_and_arguments_stream_by_place() {
    let shown = last(&[added(1, message(json!([]))), delta("output_text", 1, "Hi")]).unwrap();
    assert_eq!(shown, Some(AnswerEvent::Text { index: 1, text: "Hi".to_owned() }));
    let shown = last(&[added(2, call(json!(""))), delta("function_call_arguments", 2, "{}")]).unwrap();
    let (call_id, name) = ("c".to_owned(), "f".to_owned());
    assert_eq!(shown, Some(AnswerEvent::Arguments { index: 2, call_id, name, text: "{}".to_owned() }));
    assert_eq!(last(&[delta("function_call_arguments", 2, "{}")]), Ok(None));
    assert_eq!(last(&[delta("reasoning_summary_text", 0, "hm")]), Ok(None));
}

#[test]
fn an_output_that_the_last_event_lacks_is_what_came_before() {
    let done = json!({"type": "response.output_item.done", "output_index": 0, "item": call(json!("{}"))});
    let Ok(Some(AnswerEvent::Complete(completion))) = last(&[done, completed(json!([]))]) else { panic!() };
    assert!(matches!(&completion.parts[..], [Part::ToolCall { index: 0, .. }]), "{completion:?}");
}

#[test]
fn a_refusal_is_kept_for_the_model_beside_calls_only() {
    let refusal = message(json!([{"type": "refusal", "refusal": "No."}]));
    let refused = Part::Refusal { text: "No.".to_owned() };
    assert_eq!(completion(json!([refusal])).parts, std::slice::from_ref(&refused));
    let parts = completion(json!([refusal, call(json!("{}"))])).parts;
    let kept = Part::Message { index: 0, text: String::new(), raw: Some(refusal) };
    assert_eq!(parts[..2], [kept, refused]);
}

#[test]
fn arguments_that_are_no_text_are_made_one() {
    let parts = completion(json!([call(json!({"x": 1}))])).parts;
    let Part::ToolCall { arguments, raw: Some(raw), .. } = &parts[0] else { panic!("{parts:?}") };
    assert_eq!((arguments.as_str(), &raw["arguments"]), ("{\"x\":1}", &json!("{\"x\":1}")));
}

#[test]
fn usage_is_read_from_every_end() {
    let usage = json!({
        "input_tokens": 100, "input_tokens_details": {"cached_tokens": 60},
        "output_tokens": 20, "output_tokens_details": {"reasoning_tokens": 5}, "total_tokens": 120,
    });
    let expected = TokenUsage {
        input_tokens: 40,
        cache_read_tokens: 60,
        output_tokens: 20,
        reasoning_tokens: 5,
        ..TokenUsage::default()
    };
    for kind in ["completed", "incomplete", "failed"] {
        let end = json!({"type": format!("response.{kind}"), "response": {"output": [], "usage": usage}});
        let usage = match last(&[end]) {
            Ok(Some(AnswerEvent::Complete(completion))) => completion.usage,
            Ok(other) => panic!("{other:?}"),
            Err(cut) => cut.usage,
        };
        assert_eq!(usage, Some(expected), "{kind}");
    }
}

#[test]
fn what_the_provider_ends_itself_is_the_models_failure() {
    let begun = added(0, message(json!([])));
    let said = delta("output_text", 0, "Half");
    let ends = [
        (
            json!({"type": "response.incomplete", "response": {"incomplete_details": {"reason": "max_output_tokens"}}}),
            "The model's response is incomplete: max_output_tokens.",
        ),
        (
            json!({"type": "response.failed", "response": {"error": {"code": "server_error", "message": "Sorry."}}}),
            "The model's response failed: Sorry.",
        ),
        (json!({"type": "error", "code": "overloaded", "message": "Busy."}), "The model's response failed: Busy."),
        (json!({"type": "error", "error": {"message": "Busy."}}), "The model's response failed: Busy."),
        (json!({"type": "error"}), "The model's response failed: no reason given"),
    ];
    for (end, reason) in ends {
        let cut = last(&[begun.clone(), said.clone(), end]).unwrap_err();
        assert_eq!((cut.code, cut.reason.as_str()), (RunErrorCode::ModelBehavior, reason));
        assert!(matches!(&cut.partial[..], [Part::Message { text, .. }] if text == "Half"), "{cut:?}");
    }
}

#[test]
fn what_nobody_here_can_answer_is_the_models_failure() {
    for kind in UNSERVED {
        let cut = last(&[completed(json!([{"type": kind, "id": "x"}]))]).unwrap_err();
        assert_eq!(cut.code, RunErrorCode::ModelBehavior);
        assert!(cut.reason.contains(kind), "{cut}");
    }
}

#[test]
fn calls_and_items_are_bounded() {
    let calls = |count: usize| json!(vec![call(json!("{}")); count]);
    assert_eq!(completion(calls(MAX_CALLS)).parts.len(), MAX_CALLS);
    assert_eq!(last(&[completed(calls(MAX_CALLS + 1))]).unwrap_err().code, RunErrorCode::ModelUnavailable);
    let mut assembly = Assembly::default();
    for index in (0..).take(MAX_ITEMS) {
        assembly.add(event(added(index, json!({}))), &redactor()).unwrap();
    }
    assembly.add(event(added(u32::MAX, json!({}))), &redactor()).unwrap_err();
}
