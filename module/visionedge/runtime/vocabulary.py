"""The words of our own messages, states and codes, and the user names that cameras come with.

A password may be such a word. Masking it by its value would make each sentence with that word unreadable,
and would tell which word the password is. So these words are masked only where a secret has its place: in
addresses, headers and pairs such as ``password=…``.
"""

OWN_WORDS = frozenset(
    """
abandoned about above absent accept accepted access accuracy acknowledged across action active add added
address addresses adds adj admin administrator after afterwards again against age agent ages agree aiohttp
algo alias alike alive all alloc allocate allow allowed allows allowzero almost alone already also
although always amd among amx analyse analysed analyzeduration ancestors anchor anchors and anew annotate
annotations anonymous another answer answered answering answers any anything anywhere apart api append
application applied applying archive are area arena args arguments aria around array arrive arrived ascii
asctime aside asimd asimddp ask asked asking asks assign assignment assumed asyncio attends attributes
audio auth authenticate authentication author authority authorization auto automatically available average
avi avx away axes axis azl azure azureiotedge back background bad bare base baseline basic batch batches
bbox bear bearer became because become becomes before began begin begins begun behind being belong belongs
below bench beside best better between beyond bfloat bgr bgtx bias bilinear bill binary bind binds bins
bintel bits black blame blank blanks blas block blocks blue bmp body book bool boolean born both
bottleneck bottom bound boundary box boxes bquadro braced bracket brackets branches break brings broke
broken buckets budget buffers build builder built bundle bundled burst bus busy but bytes cache calibrate
call called calls cam came camera cameras can candidate cannot capability capacity capi caption capture
captured car card carries case categories category cause caution ceiling cell cells center centernet
centre centres certificate certificates cfg cfs cgroup chain challenge challenges change changed changes
changing channel channels character characters charset check checked checkout checks child chn choice
choose chosen chown cid class classes classification clearly client clients clip clips clock close closed
closes closing coalesce coco code codec codes col colleague color colour colours columns com come comes
comm common compare compared compares comparing compatibility compile compiled compiling complete
components compressed compression compute computed computes computing condition confidence config
configuration configurations configured connect connected connecting connection connections connects
considers const constant constants constrained container containerd containerenv content context conv
convolutions copied copy core cores corners cost costs could count counted counter counts cpu cpuinfo
crash crashed crashes create createoptions credential credentials crf css ctl ctx cublas cuda cudart cudnn
cufft cumulative curand cusparse customvision cut cvexport daily damaged dark dart dashed dashes data
datacenter datatype date day days dda debug decode decoded decoder decodes decoding deeds deeper default
defs degrade degraded deliver delivered delivering delivery demanded demo denied dependent deploy deployed
deployment depthwise description desired detail details detect detection detections detector detr dev
deviation device devices dict did die died dies differ difference different differs digest digits
dilations dim direct direction directml disable disabled discarded disconnect disconnected disk div dmi
dock docker dockerenv docs doctor doctype document does done door dots double doubt down download dozens
draft draws drew driver drivers drives drop dropouts dropped drops dry dtype due duration dxg each early
eased echo edge edgecolor edgehub edition effect effective efficientdet eflow elevated else elsewhere
empty enable enabled end ended ending endpoints ends engine enough enterprise enum env environment epoch
epsilon error errorcode errors escaped estimate eval even event events ever every everything everywhere
evidence exactly examine examined examines example examples excluded exec executing exhausted exist exit
exp expectation expected explains export exports extend extensions external extra fabric fabricmanager
fail failed fails failure faint fainter fairness fall fallback falling false family far fast faster
fastest fastestdet fault faults fcc fell fetched fetching few figure figures file files fill filled fills
filter find finding findings finds fine finish finished finite fire first fit fits fixed fixes flags flat
flatter flight float floats fma folder folders follow followed font fontsize fonttype footer for forbid
forbidden force form format formed forward found four fps fpsprobesize frame frameon framerate frames free
frequency fresh from front frozen fulfilled full function further gain gap garbage gate gated gateway
gathered gauge gave geforce generate get gets give given gives goes gone good goodput got gpu gpus grab
graph graphics graphs gray grey grid group guessed guest gzip had half hand handed handing hands hang
hangs happens has hashsalt have head header headers headless heads health healthz height heights held help
helps here hexadecimal hides high higher histogram hold holds home host hour hours how href html http
https hub hung hyper identifier identity idle ids igd igfx ignore iig image images img imgsz imported
included index inf infer inference infinity info init initial inject ink input inputs insecure inside
inspect install installation installed instances instead int integer integers integrated integrity intel
internal interrupted interval into intra invalid iot iotedge iou iscrowd items its itself jitter jobs
joined joins journal jpeg jpg json jsonl judge judged judges just jwt keep keeps kept kernel kernels key
keyboard keys kind kinds knob know known knows kubepods label labelcolor labels labelsize lacks ladder
lane lanes lang large larger largest last late latencies latency later latest latin layered lead leads
least leave leaves left legend length less let lets letterbox letterboxed letters level levelname levels
lib libcu libcublas libcuda libcudart libcudnn libcufft libcurand libdxcore libnvdxgdmal libnvidia
libnvinfer libonnxruntime libpod libraries library libx license lie lies light like limit limits line
linear lines linewidth link linked lint linux list listed listen lists literal little live lived load
loaded loader loading loads loc local localhost locally location lock locking log login loginpas loginuse
long longer longest look looked looking looks loop loopback loops loses loss lost low lower machine
machines made main major make makes making management manager manifest manifests many map mapping maps
mariner mark marked marks masked matched matplotlib max maximum maxwell may mcr mean meaning means measure
measured measuring media median medium meet megapixels mem meminfo memory message messages meta metadata
meter meters method methods metrics microsoft middle milliseconds min mind mine minimum minute minutes
misc mismatch missing mitigation mixed mjpg mkv moby mode model models modes modprobe module modules
moment moments more most motion mouse mov move moved moves moving mpeg mpg msg much multipart multiply
must muted name named names nan nanodet narrow narrowed native ndarray nearest nearly need needed needs
negative neither nested nests network networks never nevertheless new newer newest next nhwc nms nobody
node nodes nodev noise none nor noref norm normalises nosniff nosuid not note notes nothing now nowhere
ntp null number numbers numpy nvdec nvidia nvidiactl object objectness objects octet off offered offers
offset often old older oldest omitted once one ones only onnx onnxruntime onvif oom open openapi opencv
opened opening openvino operator operators ops opset opt optimization option options order org origin
original osrelease other others otherwise our ours out outbox outcome outgoing output outputs outright
outside over overdue overlap overlapping overload overs oversize own owner pace paces package packages
packed packets pad paddle pads page paho pair pairs parameters parent parity part particular parts pass
passphrase passthrough passw passwd password passwords patch patches path paths pattern payload pci
pending people per percentiles period perm permissions person phone photo photos picodet picture pictures
pid piece pieces ping pip pipeline pixel pixels place placed placeholder placeholders placement places
plain plan plans plant platform plays plots plug png pointer poison port ports post power precision
precisions prefer prefix preparation prepared preset pretended primary priority privileges pro probe
probes probing problem problems proc process processes processor producer product profile program programs
properties proto protocol provider providers proxy psw public publish published publishes pulled purpose
put pwd pyav pycocotools python pytorch qdq qnn quadro quality quant queries query quota quote quotes
raise ran range ranges rate rates rather ratio ratios raw reach reached read readiness reads ready readyz
really realm reason reasons rebuild rebuilds recall received recipe recommended reconnect reconnecting
record recovering recovery red redirected ref reference referrer refusal refusals refuse refused refuses
reg registry regular reinstall rejected release remainder remedies remedy remote remove renew renewed
repeatable repeats replace replaced replaces reply report reported reporting reports request requested
requests required resample resized resolution resolve resolved response responses rest restart restarted
restarting restarts result results retiring return returned reverse rewritten rgb right rights ring rise
rocm role room root rotation round rounded rounds route routes row rows rtdetr rtsp rtsps rtx rule rules
run rung rungs running runs runtime rwm safe said same sameness sans sas saturate saturation save saves
saw say says scale scaled scales scaling scene schedstat schedule schema schemas scheme scope score scores
script sdp search second seconds secret secrets section sections security see seen sees self send sends
sense sensor sent sentence sequence sequences series serif served server servers serves service serving
session sessionid set sets setting settings settled seven several severity sha shape shapes share shared
sharing sheep shift shm should show shows shutdown side sig sigmoid sign signal signature silence silent
simple simulator since single sink site six size sizes skip skipped sleeps slo slot slow slowed slows
small smaller smi smpte snapshot socket softmax software some something source spare sparse speaks speed
spent spinning spoils spool sqlite square src sreadyz sse stable stacks stage stages stale stand stands
start started starting starts stat state stated states statm status statuses stay stays std stderr stdin
stdout step steps sticky still stop stopped stopping stops storage store str strategy stream streams
streamtype stretch stretched stretches stride strides string strongest stub stubs stuck style sub
subprocess subscribing substream subtract subtracted subtracts subtype such sudo sum summary supervisor
support supported supports suppressed suppresses suppressing suppression sure surrogatepass surroundings
survives sve svg swaps switched synchronised synchronous synthetic sys system systemctl table tag take
taken takes taking target task tbody tcp telemetry tell telling tells template templates tensor tensorrt
tensors tesla test tests text tfod than that the thead their them then there these they thing things this
thorough those thread threads three throttle through tidying tie tier tif tiff tile tiles time timedatectl
timeout times timing tiny title tls tmp together token tokens told tolerance tomorrow too took toolkit
tools top topleft total touched tracks traffic train training transformer transformers transport
transportmode trial trials tried trt truck true trusted truth try trying tsv tuple turn turns twice twin
two txt type types udp uint ultralytics unauthorized unavailable unchanged undecided under unhealthy
unicast unified uninstall unit units unix unknown unless unlike unmatched unplanned unreadable unseen
unsupported until untold update updated updates upgrade upload uploaded upper upstream uptime uri url
urllib usable use used user usermod username uses using usr usual utf utility uvm vain val valid value
values var variable variables variant variants vendor verbs verdict verify version versions very video
videocodec videos viewer viewers viewport virtual visible vision visionedge visitors vmbus vnni void
volume wait waited waiting waits wal want wanted wants warm warmed warming warn warning warnings was way
ways web webm webp weight weights well went were what whatever when where whether which while who whoever
whole whose why wide wider width widths will win window windows wins winver wished with within without won
word words work worked workload works workspace worse would writable write writes writing written wrong
wsl www xtick yaml yard yes yet yml yolov yolox you your ytick yuv yuvj zero zeros zip zone zones
""".split()  # noqa: SIM905 - a list would take a line for each word
)
