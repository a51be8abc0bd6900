//! Compiles `hallpass.v1` and an empty RPC for the server, and its descriptor set for reflection; packs what the page of `/docs/` is made of.

use std::{
    env,
    error::Error,
    fs,
    io::{self, Cursor},
    path::{Path, PathBuf},
};

use flate2::{Compression, write::GzEncoder};
use prost::Message;
use tonic_prost_build::manual::{Builder, Method, Service};
use utoipa_swagger_ui_vendored::SWAGGER_UI_VENDORED;
use zip::ZipArchive;

/// Of Swagger UI's release, what the page needs.
const DOCS_ASSETS: [&str; 2] = ["swagger-ui-bundle.js", "swagger-ui.css"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(
        [
            "hallpass/v1/admin_service.proto",
            "hallpass/v1/audit_service.proto",
            "hallpass/v1/permission_service.proto",
        ],
        ["proto"],
    )?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("hallpass.v1.binpb"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .build_client(false)
        .codec_path("crate::grpc::codec::Codec")
        .extern_path(".google.rpc", "::tonic_types::pb")
        .compile_fds(descriptors)?;
    Builder::new().build_client(false).compile(&[empty_rpc()]);
    pack_docs_assets(&out)
}

/// What `hallpass bench` compares a check with. It is not in `proto`, for nobody else calls it.
fn empty_rpc() -> Service {
    let payload = "crate::cli::bench::empty::Payload";
    let call = Method::builder()
        .name("call")
        .route_name("Call")
        .input_type(payload)
        .output_type(payload)
        .codec_path("tonic_prost::ProstCodec")
        .build();
    (Service::builder()
        .name("EmptyService")
        .package("hallpass.bench"))
    .method(call)
    .build()
}

/// Writes each asset to `out` as browsers take it: packed once, here.
fn pack_docs_assets(out: &Path) -> Result<(), Box<dyn Error>> {
    let mut release = ZipArchive::new(Cursor::new(SWAGGER_UI_VENDORED))?;
    for asset in DOCS_ASSETS {
        let inside = format!("/dist/{asset}");
        let name = (release.file_names().filter_map(Result::ok))
            .find(|name| name.ends_with(&inside))
            .ok_or("Swagger UI has another layout")?
            .into_owned();
        let packed = fs::File::create(out.join(format!("{asset}.gz")))?;
        let mut packed = GzEncoder::new(packed, Compression::best());
        io::copy(&mut release.by_name(&name)?, &mut packed)?;
        packed.finish()?;
    }
    Ok(())
}
