//! Requests as they are decoded: by prost, once they are known to be few enough.
//!
//! Invariant: nothing is allocated for items that will be refused. An empty item is two bytes of a request and 72 of
//! memory.

use prost::{
    Message,
    bytes::Buf,
    encoding::{DecodeContext, decode_key, skip_field},
};
use tonic::{
    Status,
    codec::{BufferSettings, DecodeBuf, Decoder},
};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

use super::{permission_service::BATCH_ITEMS_MAX, status};

/// The field of `items`, the only one of all requests that repeats (inside an item of admin's, users do, within the bytes
/// that a change may have). In others it is said once.
const ITEMS: u32 = 1;

/// Encodes as prost does, and counts before it decodes.
#[derive(Debug)]
pub struct Codec<T, U>(ProstCodec<T, U>);

/// Counts, then decodes as prost does.
#[derive(Debug)]
pub struct Counting<U>(ProstDecoder<U>);

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Self(ProstCodec::new())
    }
}

impl<T, U> tonic::codec::Codec for Codec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = Counting<U>;

    fn encoder(&mut self) -> Self::Encoder {
        self.0.encoder()
    }

    fn decoder(&mut self) -> Self::Decoder {
        Counting(self.0.decoder())
    }
}

impl<U: Message + Default> Decoder for Counting<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        // A message is in one piece: tonic has collected, or unpacked, it whole.
        let items = items(buffer.chunk());
        if items > BATCH_ITEMS_MAX {
            return Err(status::too_many_items(items));
        }
        self.0.decode(buffer)
    }

    fn buffer_settings(&self) -> BufferSettings {
        self.0.buffer_settings()
    }
}

/// Items of a message, up to where it is malformed: there decoding ends as well.
fn items(mut message: &[u8]) -> usize {
    let mut items = 0;
    while message.has_remaining() {
        let Ok((field, wire_type)) = decode_key(&mut message) else {
            break;
        };
        if field == ITEMS {
            items += 1;
        }
        let skipped = skip_field(wire_type, field, &mut message, DecodeContext::default());
        if skipped.is_err() {
            break;
        }
    }
    items
}
