//! What a GraphQL document may cost, decided before async-graphql looks at it.
//!
//! async-graphql's validation follows fragments without memory: thirty-two fragments, each spreading the
//! next one twice, keep it busy for hours before any depth or complexity is known. It also has no limit on
//! tokens or aliases, and its parser recurses on every bracket. So this extension counts tokens and nesting
//! on the bare text, parses, weighs every fragment once, and hands the parsed document on.
//!
//! Everything refused here carries `extensions.code`, and [`Refused`] as its source, by which the doors
//! tell a request that was never executed from one whose execution failed.

use std::any::TypeId;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_graphql::extensions::{
    Extension, ExtensionContext, ExtensionFactory, NextExecute, NextParseQuery, NextPrepareRequest, NextValidation,
};
use async_graphql::parser::parse_query;
use async_graphql::parser::types::{
    DocumentOperations, ExecutableDocument, OperationDefinition, OperationType, Selection, SelectionSet,
};
use async_graphql::{
    ErrorExtensionValues, Pos, Positioned, Request, Response, ServerError, ServerResult, ValidationResult, Variables,
};

use super::tokens;
use crate::config::GraphqlConfig;
use crate::error::Error;

/// Brackets within brackets, and selections within selections with fragments followed. async-graphql's own
/// parser stops at as many, but only after a recursive descent that has no bound.
const MAX_NESTING: usize = 64;
/// Bytes of a name. Validation repeats names in its messages, so a long one would be multiplied.
const MAX_NAME_BYTES: usize = 256;
/// Selections once every fragment is written out: what async-graphql's visitors walk.
const MAX_EXPANDED_SELECTIONS: usize = 10_000;
/// Lists of types or fields within one another under `__schema` and `__type`; each level multiplies the
/// answer by the schema's size. Two are what tools ask for; graphql-js draws the same line.
const MAX_INTROSPECTION_LISTS: usize = 2;
/// Validation errors that are reported; more tell nobody anything.
const MAX_VALIDATION_ERRORS: usize = 20;
/// The most that one list may cost, so that sums of costs can't overflow.
const COST_CEILING: usize = u32::MAX as usize;

const PARSE_FAILED: &str = "GRAPHQL_PARSE_FAILED";
const VALIDATION_FAILED: &str = "GRAPHQL_VALIDATION_FAILED";
const OPERATION_UNKNOWN: &str = "OPERATION_RESOLUTION_FAILURE";
const LIMIT_EXCEEDED: &str = "LIMIT_EXCEEDED";
const BAD_REQUEST: &str = "BAD_REQUEST";

/// The limits of one document, and the extension that enforces them.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    max_depth: usize,
    max_introspection_depth: usize,
    max_complexity: usize,
    max_aliases: usize,
    max_directives: usize,
    max_tokens: usize,
    /// Of a query or mutation, from its execution's start.
    timeout: Duration,
}

impl From<&GraphqlConfig> for Limits {
    fn from(config: &GraphqlConfig) -> Self {
        Self {
            max_depth: config.max_depth,
            max_introspection_depth: config.max_introspection_depth,
            max_complexity: config.max_complexity,
            max_aliases: config.max_aliases,
            max_directives: config.max_directives,
            max_tokens: config.max_tokens,
            timeout: Duration::from_millis(config.timeout_ms),
        }
    }
}

/// How many results the client's connection can take. A door puts it into the request's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// One; subscriptions are refused.
    Single,
    /// Any number.
    Stream,
}

/// Marks, as [`ServerError::source`], an error that kept the request from being executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The document was refused: it doesn't parse, isn't valid, or costs too much.
    Document,
    /// The request was refused whatever its document says.
    Request,
}

impl Refused {
    /// Why the response is no execution's, if it isn't.
    pub fn of(response: &Response) -> Option<Self> {
        response.errors.iter().find_map(|error| error.source::<Self>().copied())
    }

    fn error(self, code: &str, message: impl Into<String>, pos: Option<Pos>) -> ServerError {
        self.mark(code, ServerError::new(message, pos))
    }

    fn mark(self, code: &str, mut error: ServerError) -> ServerError {
        error.extensions.get_or_insert_with(ErrorExtensionValues::default).set("code", code);
        error.source = Some(Arc::new(self));
        error
    }
}

/// What a list costs: an element's cost for each element asked for, and one for the list itself. For
/// `complexity` attributes; it never overflows, however deep lists are nested.
pub fn list_complexity(first: Option<i32>, last: Option<i32>, element: usize) -> usize {
    /// Elements of a page, unless the caller says otherwise.
    const PAGE: i32 = 20;
    let count = usize::try_from(first.or(last).unwrap_or(PAGE).max(1)).unwrap_or(1);
    element.saturating_mul(count).saturating_add(1).min(COST_CEILING)
}

impl ExtensionFactory for Limits {
    fn create(&self) -> Arc<dyn Extension> {
        Arc::new(*self)
    }
}

#[async_trait::async_trait]
impl Extension for Limits {
    async fn prepare_request(
        &self,
        ctx: &ExtensionContext<'_>,
        mut request: Request,
        next: NextPrepareRequest<'_>,
    ) -> ServerResult<Request> {
        let document = self.parse(&request.query)?;
        let operation = select(&document, request.operation_name.as_deref())?;
        let delivery = request.data.get(&TypeId::of::<Delivery>()).and_then(|data| data.downcast_ref());
        check_delivery(operation, delivery.copied().unwrap_or(Delivery::Stream))?;
        request.set_parsed_query(document);
        next.run(ctx, request).await
    }

    async fn parse_query(
        &self,
        ctx: &ExtensionContext<'_>,
        query: &str,
        variables: &Variables,
        next: NextParseQuery<'_>,
    ) -> ServerResult<ExecutableDocument> {
        // It is parsed already: all that can fail here is async-graphql's own limit on recursion.
        next.run(ctx, query, variables).await.map_err(|error| Refused::Document.mark(LIMIT_EXCEEDED, error))
    }

    async fn validation(
        &self,
        ctx: &ExtensionContext<'_>,
        next: NextValidation<'_>,
    ) -> Result<ValidationResult, Vec<ServerError>> {
        let result = next.run(ctx).await.map_err(|errors| {
            let reported = errors.into_iter().take(MAX_VALIDATION_ERRORS);
            reported.map(|error| Refused::Document.mark(VALIDATION_FAILED, error)).collect::<Vec<_>>()
        })?;
        check("complexity", result.complexity, self.max_complexity)?;
        Ok(result)
    }

    async fn execute(
        &self,
        ctx: &ExtensionContext<'_>,
        operation_name: Option<&str>,
        next: NextExecute<'_>,
    ) -> Response {
        // Only queries and mutations come this way; a subscription lives as long as its caller may.
        match tokio::time::timeout(self.timeout, next.run(ctx, operation_name)).await {
            Ok(response) => response,
            Err(_) => {
                let mut error = ServerError::new(Error::Timeout.to_string(), None);
                error.extensions.get_or_insert_with(ErrorExtensionValues::default).set("code", Error::Timeout.code());
                Response::from_errors(vec![error])
            }
        }
    }
}

impl Limits {
    /// The document, if it parses and stays within the limits.
    fn parse(&self, query: &str) -> ServerResult<ExecutableDocument> {
        let measure = tokens::measure(query);
        if measure.tokens == 0 {
            return Err(Refused::Request.error(BAD_REQUEST, "The query is empty.", None));
        }
        check("number of tokens", measure.tokens, self.max_tokens)?;
        check("nesting of brackets", measure.nesting, MAX_NESTING)?;
        check("number of bytes of a name", measure.longest_name, MAX_NAME_BYTES)?;
        let document = parse_query(query).map_err(syntax_error)?;
        self.weigh(&document)?;
        Ok(document)
    }

    fn weigh(&self, document: &ExecutableDocument) -> ServerResult<()> {
        let mut scale = Scale::new(document);
        let mut selections = 0_usize;
        for (_, operation) in document.operations.iter() {
            scale.directives += operation.node.directives.len();
            scale.directives += operation
                .node
                .variable_definitions
                .iter()
                .map(|variable| variable.node.directives.len())
                .sum::<usize>();
            let weight = scale.selection_set(&operation.node.selection_set.node, 1)?;
            let max_depth = if weight.only_introspection { self.max_introspection_depth } else { self.max_depth };
            check("depth", weight.depth, max_depth)?;
            selections = selections.saturating_add(weight.selections);
        }
        check("number of selections with fragments written out", selections, MAX_EXPANDED_SELECTIONS)?;
        // The ones that no operation reaches too: async-graphql visits them, cycles included.
        for name in document.fragments.keys() {
            scale.fragment(name, 1)?;
        }
        check("number of aliases", scale.aliases, self.max_aliases)?;
        check("number of directives", scale.directives, self.max_directives)
    }
}

fn check(limit: &str, found: usize, max: usize) -> ServerResult<()> {
    if found <= max {
        return Ok(());
    }
    let message = format!("The query's {limit} is {found}; the maximum is {max}.");
    Err(Refused::Document.error(LIMIT_EXCEEDED, message, None))
}

/// The parser's message without its drawing of the source line, which may be a megabyte long.
fn syntax_error(error: async_graphql::parser::Error) -> ServerError {
    let error = ServerError::from(error);
    let reason = error.message.lines().last().unwrap_or_default().trim_start_matches([' ', '=']);
    let mut marked = Refused::Document.error(PARSE_FAILED, format!("Syntax error: {reason}"), None);
    marked.locations = error.locations;
    marked
}

/// The operation that the request names, or the only one.
/// Source: <https://spec.graphql.org/September2025/#GetOperation()>.
fn select<'a>(
    document: &'a ExecutableDocument,
    name: Option<&str>,
) -> ServerResult<&'a Positioned<OperationDefinition>> {
    let found = match (&document.operations, name) {
        (DocumentOperations::Single(operation), None) => Some(operation),
        (DocumentOperations::Single(_), Some(_)) => None,
        (DocumentOperations::Multiple(operations), Some(name)) => operations.get(name),
        (DocumentOperations::Multiple(operations), None) if operations.len() == 1 => operations.values().next(),
        (DocumentOperations::Multiple(_), None) => None,
    };
    found.ok_or_else(|| {
        let message = match name {
            Some(name) => format!("The query has no operation named {name:?}."),
            None => "The query has several operations: say which one in operationName.".to_owned(),
        };
        Refused::Document.error(OPERATION_UNKNOWN, message, None)
    })
}

fn check_delivery(operation: &Positioned<OperationDefinition>, delivery: Delivery) -> ServerResult<()> {
    if operation.node.ty != OperationType::Subscription {
        return Ok(());
    }
    if delivery == Delivery::Single {
        let message = "A subscription has many results: send `Accept: text/event-stream`, or open a WebSocket \
                       with the subprotocol graphql-transport-ws.";
        return Err(Refused::Request.error(BAD_REQUEST, message, Some(operation.pos)));
    }
    // The specification's "single root field"; async-graphql would run several side by side, and pass over
    // fragments in silence.
    match operation.node.selection_set.node.items.as_slice() {
        [Positioned { node: Selection::Field(_), .. }] => Ok(()),
        _ => {
            let message = "A subscription selects exactly one field, and not through a fragment.";
            Err(Refused::Document.error(VALIDATION_FAILED, message, Some(operation.pos)))
        }
    }
}

/// What a selection set comes to with its fragments written out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Weight {
    /// Fields, spreads and inline fragments.
    selections: usize,
    /// Levels of fields.
    depth: usize,
    /// Lists of introspection within one another.
    introspection_lists: usize,
    /// Whether its own fields, not those beneath, all introspect.
    only_introspection: bool,
}

impl Weight {
    const EMPTY: Self = Self { selections: 0, depth: 0, introspection_lists: 0, only_introspection: true };

    fn add(&mut self, other: Self) {
        self.selections = self.selections.saturating_add(other.selections).saturating_add(1);
        self.depth = self.depth.max(other.depth);
        self.introspection_lists = self.introspection_lists.max(other.introspection_lists);
        self.only_introspection &= other.only_introspection;
    }
}

enum Fragment {
    Weighing,
    Weighed(Weight),
}

/// Weighs the selection sets of a document, each fragment once.
struct Scale<'a> {
    document: &'a ExecutableDocument,
    fragments: HashMap<&'a str, Fragment>,
    aliases: usize,
    directives: usize,
}

impl<'a> Scale<'a> {
    fn new(document: &'a ExecutableDocument) -> Self {
        Self { document, fragments: HashMap::new(), aliases: 0, directives: 0 }
    }

    fn fragment(&mut self, name: &'a str, level: usize) -> ServerResult<Weight> {
        let Some(fragment) = self.document.fragments.get(name) else {
            // Validation says so.
            return Ok(Weight::EMPTY);
        };
        match self.fragments.get(name) {
            Some(Fragment::Weighed(weight)) => return Ok(*weight),
            Some(Fragment::Weighing) => {
                let message = format!("The fragment {name:?} spreads itself.");
                return Err(Refused::Document.error(VALIDATION_FAILED, message, Some(fragment.pos)));
            }
            None => {}
        }
        self.fragments.insert(name, Fragment::Weighing);
        self.directives += fragment.node.directives.len();
        let weight = self.selection_set(&fragment.node.selection_set.node, level)?;
        self.fragments.insert(name, Fragment::Weighed(weight));
        Ok(weight)
    }

    fn selection_set(&mut self, set: &'a SelectionSet, level: usize) -> ServerResult<Weight> {
        // Each level here is a level of this function's recursion.
        check("nesting of selections", level, MAX_NESTING)?;
        let mut total = Weight::EMPTY;
        for selection in &set.items {
            self.directives += selection.node.directives().len();
            let weight = match &selection.node {
                Selection::Field(field) => {
                    self.aliases += usize::from(field.node.alias.is_some());
                    let beneath = self.selection_set(&field.node.selection_set.node, level + 1)?;
                    field_weight(&field.node.name.node, beneath)?
                }
                Selection::InlineFragment(inline) => self.selection_set(&inline.node.selection_set.node, level + 1)?,
                Selection::FragmentSpread(spread) => self.fragment(&spread.node.fragment_name.node, level + 1)?,
            };
            total.add(weight);
        }
        check("number of selections with fragments written out", total.selections, MAX_EXPANDED_SELECTIONS)?;
        Ok(total)
    }
}

fn field_weight(name: &str, beneath: Weight) -> ServerResult<Weight> {
    if matches!(name, "__schema" | "__type") {
        check("nesting of introspection lists", beneath.introspection_lists, MAX_INTROSPECTION_LISTS)?;
    }
    let is_list = matches!(name, "fields" | "inputFields" | "interfaces" | "possibleTypes");
    Ok(Weight {
        selections: beneath.selections,
        depth: beneath.depth.saturating_add(1),
        introspection_lists: beneath.introspection_lists + usize::from(is_list),
        only_introspection: name.starts_with("__"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        max_depth: 4,
        max_introspection_depth: 20,
        max_complexity: 100,
        max_aliases: 2,
        max_directives: 2,
        max_tokens: 2_000,
        timeout: Duration::from_secs(1),
    };

    fn refusal(query: &str) -> (String, String) {
        let error = LIMITS.parse(query).expect_err("it is refused");
        let code = error.extensions.as_ref().and_then(|extensions| extensions.get("code").cloned());
        (code.map(|code| code.to_string()).unwrap_or_default(), error.message)
    }

    #[test]
    fn depth_counts_fields_through_fragments() {
        assert!(LIMITS.parse("{ a { b { c { d } } } }").is_ok());
        let (code, message) = refusal("{ a { ...F } } fragment F on T { b { ... on U { c { d { e } } } } }");
        assert_eq!(code, r#""LIMIT_EXCEEDED""#);
        assert_eq!(message, "The query's depth is 5; the maximum is 4.");
    }

    #[test]
    fn introspection_alone_may_be_deeper() {
        let deep = "__schema { types { ofType { ofType { ofType { name } } } } }";
        assert!(LIMITS.parse(&format!("{{ {deep} }}")).is_ok());
        assert!(LIMITS.parse(&format!("{{ __typename ...F }} fragment F on Query {{ {deep} }}")).is_ok());
        assert!(refusal(&format!("{{ {deep} viewer {{ id }} }}")).1.contains("depth is 6"));
    }

    #[test]
    fn introspection_lists_dont_multiply() {
        assert!(LIMITS.parse("{ __schema { types { fields { type { fields { name } } } } } }").is_ok());
        let nested = "{ __schema { types { fields { type { ...T } } } } } fragment T on __Type \
                      { interfaces { possibleTypes { name } } }";
        assert!(refusal(nested).1.contains("nesting of introspection lists is 3"));
        // Fields of ours may have these names.
        assert!(LIMITS.parse("{ fields { fields { fields { fields } } } }").is_ok());
    }

    #[test]
    fn doubling_fragments_are_weighed_once() {
        let fragment = |n: usize| format!("fragment F{n} on Q {{ ...F{} ...F{} }} ", n + 1, n + 1);
        let query = format!("{{ ...F0 }} {} fragment F40 on Q {{ a }}", (0..40).map(fragment).collect::<String>());
        let (code, message) = refusal(&query);
        assert_eq!(code, r#""LIMIT_EXCEEDED""#);
        assert!(message.contains("fragments written out"), "{message}");
    }

    #[test]
    fn operations_add_up() {
        let fragment = |n: usize| format!("fragment F{n} on Q {{ ...F{} ...F{} }} ", n + 1, n + 1);
        let fragments = format!("{}fragment F11 on Q {{ a }}", (0..11).map(fragment).collect::<String>());
        assert!(LIMITS.parse(&format!("query A {{ ...F0 }} {fragments}")).is_ok());
        let query = format!("query A {{ ...F0 }} query B {{ ...F0 }} query C {{ ...F0 }} {fragments}");
        assert!(refusal(&query).1.contains("fragments written out"));
    }

    #[test]
    fn cycles_are_found_in_unused_fragments_too() {
        for query in [
            "{ ...A } fragment A on Q { a { ...A } }",
            "{ a } fragment A on Q { ...B ...B } fragment B on Q { ...A ...A }",
        ] {
            let (code, message) = refusal(query);
            assert_eq!(code, r#""GRAPHQL_VALIDATION_FAILED""#);
            assert!(message.contains("spreads itself"), "{message}");
        }
    }

    #[test]
    fn aliases_and_directives_count_wherever_they_stand() {
        assert!(LIMITS.parse("{ x: a y: b }").is_ok());
        assert!(refusal("{ x: a ...F } fragment F on Q { y: a ... { z: a } }").1.contains("aliases is 3"));
        let query = "query($v: Int @d) @d { a ...F @d } fragment F on Q @d { b @d ... @d { c } }";
        assert!(refusal(query).1.contains("directives is 6"));
    }

    #[test]
    fn tokens_and_brackets_are_bounded_before_parsing() {
        assert!(refusal(&format!("{{ a(x: [{}]) }}", "1 ".repeat(2_000))).1.contains("number of tokens"));
        assert!(refusal(&format!("{{ a(x: {}", "[".repeat(900))).1.contains("nesting of brackets is 902"));
        assert!(refusal(&format!("{{ {} }}", "a".repeat(300))).1.contains("bytes of a name is 300"));
        assert!(LIMITS.parse(&format!("{{ a(x: \"{}\") }}", "[".repeat(900))).is_ok());
    }

    #[test]
    fn syntax_errors_say_what_was_expected_without_the_source() {
        let (code, message) = refusal("{ secretField ");
        assert_eq!(code, r#""GRAPHQL_PARSE_FAILED""#);
        assert!(message.starts_with("Syntax error: expected"), "{message}");
        assert!(!message.contains("secretField"));
        assert_eq!(refusal(" # nothing\n").1, "The query is empty.");
    }

    #[test]
    fn operations_are_selected_as_the_specification_says() {
        let document = parse_query("query A { a } query B { b }").expect("it parses");
        assert!(select(&document, Some("B")).is_ok());
        assert!(select(&document, Some("C")).is_err());
        assert!(select(&document, None).is_err());
        let anonymous = parse_query("{ a }").expect("it parses");
        assert!(select(&anonymous, None).is_ok());
        assert!(select(&anonymous, Some("A")).is_err());
    }

    #[test]
    fn subscriptions_need_a_stream_and_one_field() {
        let delivery = |query: &str, delivery| {
            let document = parse_query(query).expect("it parses");
            select(&document, None).and_then(|operation| check_delivery(operation, delivery)).is_ok()
        };
        assert!(delivery("subscription { a }", Delivery::Stream));
        assert!(!delivery("subscription { a }", Delivery::Single));
        assert!(!delivery("subscription { a b }", Delivery::Stream));
        assert!(!delivery("subscription { ...F } fragment F on S { a }", Delivery::Stream));
        assert!(delivery("{ a b }", Delivery::Single));
    }

    #[test]
    fn list_complexity_saturates() {
        assert_eq!(list_complexity(Some(50), None, 3), 151);
        assert_eq!(list_complexity(None, None, 3), 61);
        assert_eq!(list_complexity(None, Some(2), 3), 7);
        assert_eq!(list_complexity(Some(-5), None, 3), 4);
        assert_eq!(list_complexity(Some(i32::MAX), None, usize::MAX), COST_CEILING);
    }
}
