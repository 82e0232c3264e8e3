//! A test on each database.

/// Makes of each `async fn name(builder: TestAppBuilder)` two tests: `name::sqlite` and `name::postgres`.
macro_rules! on_both {
    ($($name:ident),+ $(,)?) => {$(
        mod $name {
            #[tokio::test(flavor = "multi_thread")]
            async fn sqlite() {
                super::$name(cloister_tests::TestApp::builder()).await;
            }

            #[tokio::test(flavor = "multi_thread")]
            async fn postgres() {
                super::$name(cloister_tests::TestApp::builder().postgres()).await;
            }
        }
    )+};
}

pub(crate) use on_both;
