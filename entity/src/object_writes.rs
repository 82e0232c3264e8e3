//! What the api has yet to write to the objects of its cluster.

use sea_orm::entity::prelude::*;

/// What is to be done. What an object is to say is taken from the tenant's row when it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, EnumIter, DeriveActiveEnum)]
#[sea_orm(rs_type = "String", db_type = "Text", rename_all = "snake_case")]
pub enum Wish {
    /// The tenant is to have an object.
    Make,
    /// Its object is to say whether an admin has suspended it.
    Suspension,
    /// It is to have none.
    Remove,
}

/// A write that is owed to a tenant's object. It was committed together with what it follows from, and goes when it is
/// done, so that nothing is lost while the cluster is away.
#[sea_orm::model]
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "object_writes")]
pub struct Model {
    /// Whose object.
    #[sea_orm(primary_key, auto_increment = false)]
    pub tenant_id: Uuid,
    /// What is to be done.
    pub wish: Wish,
    /// Rises with each wish: what was wished for during a write is not taken for done.
    pub number: i64,
    /// How often it failed since the last wish.
    pub attempts: i32,
    /// When it is to be tried.
    pub due_at: DateTimeUtc,
    /// Until when it is being tried by somebody.
    pub claimed_until: Option<DateTimeUtc>,
    /// Why it failed last.
    pub problem: Option<String>,
    /// When it was first wished for.
    pub created_at: DateTimeUtc,
}

impl ActiveModelBehavior for ActiveModel {}
