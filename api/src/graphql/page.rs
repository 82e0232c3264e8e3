//! Relay connections: their arguments, and reading any number of them in one statement.

use std::collections::HashMap;
use std::hash::Hash;

use async_graphql::OutputType;
use async_graphql::connection::{Connection, CursorType, Edge};
use sea_orm::sea_query::{
    Alias, Asterisk, Expr, ExprTrait, IntoCondition, Order, Query, SelectStatement, UnionType, Value,
};
use sea_orm::{
    ColumnTrait, ColumnType, Condition, ConnectionTrait, EntityTrait, FromQueryResult, QueryFilter, QueryOrder,
    QuerySelect, QueryTrait, Select,
};
use uuid::Uuid;

use crate::error::Error;

/// Elements unless said otherwise.
pub const DEFAULT_SIZE: usize = 20;
/// Elements at most.
pub const MAX_SIZE: usize = 100;
/// Connections read by one statement.
const BRANCHES: usize = 100;

/// A place in a list: what it is sorted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cursor {
    /// An id; UUIDv7s sort by time.
    Id(Uuid),
    /// A sequence or a version.
    Number(i64),
    /// An item among several runs': the run and the sequence.
    Item(Uuid, i64),
}

impl CursorType for Cursor {
    type Error = Error;

    fn decode_cursor(text: &str) -> Result<Self, Error> {
        let number = |rest: &str| rest.parse().ok().map(Cursor::Number);
        let id = |rest: &str| Uuid::try_parse(rest).ok().map(Cursor::Id);
        let item = |rest: &str| {
            let (run, sequence) = rest.split_once('.')?;
            Some(Cursor::Item(Uuid::try_parse(run).ok()?, sequence.parse().ok()?))
        };
        text.strip_prefix('n')
            .and_then(number)
            .or_else(|| text.strip_prefix('i').and_then(id))
            .or_else(|| text.strip_prefix('m').and_then(item))
            .ok_or_else(|| Error::BadRequest(format!("{text:?} is not a cursor of this list.")))
    }

    fn encode_cursor(&self) -> String {
        match self {
            Cursor::Id(id) => format!("i{}", id.simple()),
            Cursor::Number(number) => format!("n{number}"),
            Cursor::Item(run_id, sequence) => format!("m{}.{sequence}", run_id.simple()),
        }
    }
}

/// The arguments of a connection, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageArgs {
    after: Option<Cursor>,
    before: Option<Cursor>,
    size: usize,
    /// From the end.
    backward: bool,
}

impl PageArgs {
    /// Checks `first`, `after`, `last` and `before` as a client gave them.
    pub fn new(
        first: Option<i32>,
        after: Option<String>,
        last: Option<i32>,
        before: Option<String>,
    ) -> Result<Self, Error> {
        let (name, size) = match (first, last) {
            (Some(_), Some(_)) => return Err(Error::BadRequest("Give first or last, not both.".to_owned())),
            (None, Some(last)) => ("last", last),
            (first, None) => ("first", first.unwrap_or(DEFAULT_SIZE as i32)),
        };
        let size = usize::try_from(size)
            .ok()
            .filter(|size| *size <= MAX_SIZE)
            .ok_or_else(|| Error::BadRequest(format!("{name} must lie between 0 and {MAX_SIZE}; it is {size}.")))?;
        let cursor = |text: Option<String>| text.map(|text| Cursor::decode_cursor(&text)).transpose();
        Ok(Self { after: cursor(after)?, before: cursor(before)?, size, backward: last.is_some() })
    }
}

/// A part of a list.
#[derive(Clone, Debug)]
pub struct Page<M> {
    /// In the list's order.
    pub rows: Vec<M>,
    has_previous: bool,
    has_next: bool,
}

impl<M> Default for Page<M> {
    fn default() -> Self {
        Self { rows: Vec::new(), has_previous: false, has_next: false }
    }
}

impl<M> Page<M> {
    /// With every row made into something else.
    pub fn try_map<N, E>(self, map: impl FnMut(M) -> Result<N, E>) -> Result<Page<N>, E> {
        let rows = self.rows.into_iter().map(map).collect::<Result<_, E>>()?;
        Ok(Page { rows, has_previous: self.has_previous, has_next: self.has_next })
    }

    /// As a connection of `node`s, each at its cursor.
    pub fn connection<N: OutputType>(self, node: impl Fn(M) -> (Cursor, N)) -> Connection<Cursor, N> {
        let mut connection = Connection::new(self.has_previous, self.has_next);
        connection.edges.extend(self.rows.into_iter().map(|row| {
            let (cursor, node) = node(row);
            Edge::new(cursor, node)
        }));
        connection
    }
}

/// A list of rows, and what it is sorted by: one column that is unique within it, or two that are
/// together.
pub struct List<E: EntityTrait> {
    /// Which rows there are.
    pub rows: Select<E>,
    /// What it is sorted by; for a [`Cursor::Item`] the run's id, with the sequence in `then`.
    pub sort: E::Column,
    /// The second column.
    pub then: Option<E::Column>,
    /// Its order.
    pub order: Order,
}

impl<E: EntityTrait> List<E> {
    /// One page of the list.
    pub async fn page(self, db: &impl ConnectionTrait, args: PageArgs) -> Result<Page<E::Model>, Error> {
        let mut pages = pages(db, vec![((), args, self)]).await?;
        Ok(pages.remove(&((), args)).unwrap_or_default())
    }

    fn query(self, args: PageArgs) -> SelectStatement {
        let ascending = self.order == Order::Asc;
        // PostgreSQL compares no id with a number.
        let sorted_by_id = *self.sort.def().get_column_type() == ColumnType::Uuid;
        let past = |column: E::Column, value: Value, later: bool| {
            if later == ascending { column.gt(value) } else { column.lt(value) }
        };
        let beyond = |cursor: Cursor, later: bool| match (cursor, self.then) {
            (Cursor::Item(run_id, sequence), Some(then)) => Condition::any()
                .add(past(self.sort, run_id.into(), later))
                .add(self.sort.eq(run_id).and(past(then, sequence.into(), later))),
            (Cursor::Id(value), None) if sorted_by_id => past(self.sort, value.into(), later).into_condition(),
            (Cursor::Number(value), None) if !sorted_by_id => past(self.sort, value.into(), later).into_condition(),
            // A cursor of another list is beyond every element of this one.
            _ => Condition::all().add(Expr::cust("1 = 0")),
        };
        let mut bounds = Condition::all();
        bounds = bounds.add_option(args.after.map(|cursor| beyond(cursor, true)));
        bounds = bounds.add_option(args.before.map(|cursor| beyond(cursor, false)));
        let order = if ascending != args.backward { Order::Asc } else { Order::Desc };
        let mut rows = self.rows.filter(bounds).order_by(self.sort, order.clone());
        if let Some(then) = self.then {
            rows = rows.order_by(then, order);
        }
        rows.limit(args.size as u64 + 1).into_query()
    }
}

/// Pages of several lists, in as few statements as can be: the number of statements doesn't depend
/// on the number of parents whose lists are asked for.
pub async fn pages<K, E>(
    db: &impl ConnectionTrait,
    lists: Vec<(K, PageArgs, List<E>)>,
) -> Result<HashMap<(K, PageArgs), Page<E::Model>>, Error>
where
    K: Eq + Hash + Clone,
    E: EntityTrait,
{
    let mut pages = HashMap::new();
    let mut lists = lists.into_iter().peekable();
    while lists.peek().is_some() {
        let mut keys = Vec::new();
        let mut union: Option<SelectStatement> = None;
        for (branch, (key, args, list)) in lists.by_ref().take(BRANCHES).enumerate() {
            let mut select = Query::select();
            select
                .column(Asterisk)
                .expr_as(Expr::cust(branch.to_string()), Alias::new("branch"))
                .from_subquery(list.query(args), Alias::new(format!("t{branch}")));
            match &mut union {
                Some(union) => drop(union.union(UnionType::All, select)),
                None => union = Some(select),
            }
            keys.push((key, args));
        }
        let Some(union) = union else { break };
        let mut rows: Vec<Vec<E::Model>> = keys.iter().map(|_| Vec::new()).collect();
        for row in db.query_all(&union).await? {
            let branch: i32 = row.try_get("", "branch")?;
            let model = E::Model::from_query_result(&row, "")?;
            if let Some(rows) = usize::try_from(branch).ok().and_then(|branch| rows.get_mut(branch)) {
                rows.push(model);
            }
        }
        pages.extend(keys.into_iter().zip(rows).map(|((key, args), rows)| ((key, args), cut(rows, args))));
    }
    Ok(pages)
}

/// One row more was read than asked for: it tells whether there are more.
fn cut<M>(mut rows: Vec<M>, args: PageArgs) -> Page<M> {
    let more = rows.len() > args.size;
    rows.truncate(args.size);
    if args.backward {
        rows.reverse();
        Page { rows, has_previous: more, has_next: args.before.is_some() }
    } else {
        Page { rows, has_previous: args.after.is_some(), has_next: more }
    }
}
